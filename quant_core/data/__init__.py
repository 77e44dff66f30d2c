"""Where samples come from, and whether they fit a model."""
