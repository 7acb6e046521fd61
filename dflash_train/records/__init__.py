"""What flows between stages: conversations, their token ids, and the manifests that vouch for
them."""
