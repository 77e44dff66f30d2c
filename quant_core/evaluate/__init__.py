"""How right and how fast a quantized model is beside its float original."""
