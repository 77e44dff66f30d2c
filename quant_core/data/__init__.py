"""Where samples come from, and whether they fit a model.

Sources of samples and their checks live here; what is measured on samples does not.

spec, for_model     what a caller asks for (SampleSpec), and the samples that come of it
samples             feeds, read one at a time: picked, split, batched
sources, npz        given samples: files, folders, arrays, feeds from Python
random_feeds, strategies, random_values, random_fields, images
                    random samples: tried in several ways until the model runs
splices             samples made of parts of given ones
inputs, input_spec, fit
                    what a model takes, and whether an array is that
input_hints, sounds, reached, units, weight_units, open_sizes, fixed_sizes
                    what a graph says about values and sizes of its inputs
flow, feeder, following
                    samples of a graph that is one of several of a model
hashes              what makes samples what they are
"""
