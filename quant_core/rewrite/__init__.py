"""How a plan and its statistics become a quantized model, node by node.

apply               `apply_plan`, its rules in order; each file below is one of them or serves some
draft, writer       the copy that is edited, what was written already, and where
rounding, weight_cache, bias_correction
                    the integers of each weight, kept for later plans; what biases give back
sequential          weights of one layer after the other, for what rounded layers give (GPTAQ)
activations         Q/DQ pairs of activations
static_nodes, dynamic, float_nodes, tables
                    what is written for a node, by how it computes
emit, emit_dynamic, emit_tables
                    the patterns of nodes that these write
lower_pairs         pairs of quantization-aware training
float_islands, dequantize_once
                    what onnxruntime would otherwise compute in integers, or twice
parts               constants that are stored as a part of another
hard_sigmoid, counted_padding
                    operators that a runtime computes slowly or wrongly, spelled out
"""
