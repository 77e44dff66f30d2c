"""Manifests and the command line, and batches and audits as runs of Prefect on Dask."""

from quant_core.late_sympy import load_sympy_late

load_sympy_late()  # before anything of this package imports onnx_ir
