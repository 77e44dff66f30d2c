"""How right and how fast a quantized model is beside its float original.

fidelity            `compare`: outputs of both models, feed by feed
output_tally, decisions, custom_metric
                    sums over one output; what it decides; a metric of the user's own
contract            whether that satisfies a contract, in one line
outputs             outputs of all feeds, run or stored
lost_channels, variation, saturation_check
                    faults of a file that a mean over outputs hides
node_noise, sensitivity, layer_report
                    what each node costs, and its row in the reports
timing, timing_cache
                    both models in turns; what was timed before
kernels, float_reasons
                    which kernels run a model, and why some compute in float
in_openvino, in_openvino_main
                    the same in OpenVINO, which has a process of its own
"""
