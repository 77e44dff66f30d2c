"""Doors and runs: the manifest, the runtime, the batch and the command line."""

from quant_core.late_sympy import load_sympy_late

load_sympy_late()  # before anything of this package imports onnx_ir
