"""Decode with a drafter, measure what it commits, and report it."""
