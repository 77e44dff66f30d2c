"""The reports of a batch as one HTML page."""
