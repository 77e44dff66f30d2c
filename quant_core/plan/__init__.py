"""What becomes of each node, and why: decided before anything is measured or rewritten.

make                `make_plan`, the order of all decisions; `replan` with other choices
types, compute      the words of a plan: QuantPlan, NodePlan, NodeChoice, Storage, Compute
operators, layouts, obstacles
                    the table of operators, RULES, and the functions of its rows
convolutions        which kernel runs a Conv
targets             the table of runtimes, TARGETS
weighted_nodes, choose_compute, weight_formats
                    a node with weights: how it computes and stores them; what shares a scale
shared, tied        nodes that read one weight: what they agree on
static_nodes, flat_ends
                    what computes on 8-bit tensors, and over which range of values
routers             products by whose results others are chosen
other_constants     constants that are no weights
nothing_to_quantize
                    the error where there is nothing to do
"""
