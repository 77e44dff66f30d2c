"""Exact rewrites: the same function with less work for onnxruntime, before anything is rounded."""
