"""What a manifest asks for: read, checked, and turned into jobs."""
