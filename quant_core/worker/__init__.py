"""How a stage of the pipeline runs in a process that can be killed.

Processes, locks, limits and /proc are known here and nowhere else in the core.
"""

from quant_core.late_sympy import load_sympy_late

load_sympy_late()  # before anything of this package imports onnx_ir
