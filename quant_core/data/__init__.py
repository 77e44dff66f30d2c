"""Where samples come from, and whether they fit a model.

Sources of samples and their checks live here; what is measured on samples does not.
"""
