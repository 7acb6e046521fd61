"""The stage `ingest`: from log lines to scrubbed conversations in three splits."""
