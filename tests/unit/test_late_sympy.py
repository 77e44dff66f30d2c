"""sympy is loaded when something is computed by it, and not before."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys

from quant_core.late_sympy import load_sympy_late

load_sympy_late()
import onnx_ir as ir

print("sympy.core" in sys.modules, ir.SymbolicDim("batch * 2") + 1, "sympy.core" in sys.modules)
"""


def test_symbolic_sizes_are_computed_at_the_first_use_of_sympy():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )

    assert done.stdout.split() == ["False", "2*batch", "+", "1", "True"]
