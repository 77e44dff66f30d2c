"""sympy computes when it is needed; test_architecture.py tests that it is not loaded before."""

from __future__ import annotations

import onnx_ir as ir


def test_symbolic_sizes_are_computed_as_before() -> None:
    assert str(ir.SymbolicDim("batch * 2") + 1) == "2*batch + 1"
