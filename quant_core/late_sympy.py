"""sympy, with which onnx_ir computes on symbolic sizes, is loaded at its first use.

It takes half a second and 30 MB of every command and of every worker's child, and none of them
computes on symbolic sizes. Only these processes ask for it: whoever imports quant_core finds
imports as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

LATE = ("sympy", "onnx_ir._symbolic_shapes")  # the second takes functions out of the first


class LateFinder(MetaPathFinder):
    """Finds the modules of LATE as Python does, but lets them load at their first use."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in LATE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


FINDER = LateFinder()


def load_sympy_late() -> None:
    """Load the modules of LATE at their first use, in all imports of this process from now on."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
