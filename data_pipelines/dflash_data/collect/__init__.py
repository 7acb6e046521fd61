"""The stage `collect`: from answered conversations to target features."""
