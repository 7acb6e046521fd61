"""The drafter: attention with KV injection, the model around it, and its checkpoint on disk."""
