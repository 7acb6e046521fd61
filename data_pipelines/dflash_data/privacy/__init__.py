"""What is private in a record, and what stands in its place."""
