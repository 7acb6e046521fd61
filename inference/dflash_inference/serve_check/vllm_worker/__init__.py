"""What runs in vLLM's environment, where nothing of ours is installed: it imports none of it."""
