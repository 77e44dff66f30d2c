"""Exact rewrites: the same function with less work for onnxruntime, before anything is rounded.

run                 applies the rules until none finds anything, checks and times what they did;
                    `follow` does the same to another copy
rules               the table of rules, EXACT and TIMED, and a file for each
applied             what rules did, a row for each change
opened, facts, same a model as onnxruntime reads it; what is known of its tensors; whether another
                    computes the same
edit, fused, parts  small changes of a graph that rules share; what must not be torn apart; what is
                    given another form as a whole
affine, chains, commute, linear, convolution, rowwise
                    algebra of operators: scale and shift, what these may pass and where they end
"""
