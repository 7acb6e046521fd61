"""The OpenAI-compatible endpoint of `serve`: requests, replies, routes, log and counts."""
