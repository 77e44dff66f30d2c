"""How a stage of the pipeline runs in a process that can be killed.

Processes, locks, limits and /proc are known here and nowhere else in the core.

run                 `run_stage`: a request goes to a warm child, within its limits
child, child_main   that child, seen by its parent; its own side
stages              the stages: JSON values in, JSON values out
memory, host        whether there is memory for a stage; what else this host does
folders             a user's own folders on this host
"""

from quant_core.late_sympy import load_sympy_late

load_sympy_late()  # before anything of this package imports onnx_ir
