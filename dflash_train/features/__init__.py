"""What the target knows: the frozen model with its taps, and the store of its features."""
