"""How an ONNX model is read, normalized, prepared, run, cut and written.

Code about models that would be the same without quantization lives here.

prepare             the way from a file to a model that can be planned
files, locations    reading a file; which files it consists of
proto, opset, old_scan, to_float32, qat, fix_shape, carried, names, origins
                    steps of prepare: what is converted, fixed, set apart or noted
compact, fuse_hard_sigmoid, normalize, deduplicate, unused, restore_interface
                    steps of prepare: what is folded, fused, tidied and given back
graph, constants, axes, choices
                    questions to a graph, and edits of it; where it ends in a choice among results
session, providers, runtime_errors, containers, external_initializers, inner_outputs, fixed_noise
                    running a model: sessions, their errors, values that are no tensors, the same
                    random numbers in each run
values, layerwise, subgraph, parallel, spill
                    values of inner tensors: of all feeds, layer by layer, of a part of a model
write, atomic, share
                    writing a file; weights that several files share
info                what `quantmill info` tells
"""
