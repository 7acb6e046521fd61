"""Where logs are and how their lines are read: files, folders, buckets, tables."""
