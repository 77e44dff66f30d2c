"""The name `quantmill`, for `python -m quantmill`."""
