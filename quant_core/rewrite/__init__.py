"""How a plan and its statistics become a quantized model, node by node."""
