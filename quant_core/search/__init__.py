"""Which of several plans is best: a bounded loop over plan, rewrite and evaluate.

pipeline            the whole way, from a job to what was made: read it first
job, result         what goes in (QuantJob), what comes out (Made, QuantResult)
checks, prepared, first_plan
                    before: paths and plans are checked, the model is rewritten and planned
judges, observing, calibrated
                    which samples judge, which calibrate; the model that candidates are made of
bit_allocation      4-bit weights in finer or coarser blocks, before a search in 4 bits
search              the search: its five steps, described at the top of the file
variants, race_variants, kernel_times
                    step 1: the rows of VARIANTS race
single_matmuls, matmul_costs
                    step 2: each MatMul in its cheapest way
assignments, node_costs, minimum_cut
                    step 3: which nodes are best put into float
choose, promotion   step 4: the best, or with a contract the fewest nodes in more bits
tune_biases         step 5: empirical bias correction
race, trace         what was tried so far, and as rows for reports
candidate, bench    one plan's model and what it is worth; what measures that
one_run, possible_gain, policy
                    how long float takes; whether a search can pay; all of its thresholds
floor, cross_validation, not_larger, before_choices
                    after: the finished model is checked, repaired, and kept small
notes, floor_notes  what people should know of the result, and of its check
"""
