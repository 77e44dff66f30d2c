"""What samples show of a float model, before anything is rounded.

It reads plans and runs float models; it never writes a quantized one.

observe             runs the samples and collects what a plan needs
stats, stats_files, thinning
                    what is remembered of a tensor, and kept; which of its values are counted
ranges, range_errors
                    the range that follows from it; what a range costs
gram, matmul_inputs
                    second moments of what weights are multiplied by, for GPTQ
equalize, scale_groups
                    cross-layer equalization: channels scaled towards equal ranges
outliers            channels that are smoothed into weights, or multiplied in float
"""
