"""The stage `regenerate`: the target answers what it did not write."""
