"""The manifest: its schema, and the jobs that it requests."""
