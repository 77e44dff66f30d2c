"""An input that a model must be fed: name, type and axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant_core.errors import nearest_hint


@dataclass(frozen=True, slots=True)
class InputSpec:
    """An input of a model. An axis is a size, a symbol, or None if any size fits.

    onnxruntime shows a scalar and an input of unknown rank alike: both have the shape ().

    container    onnxruntime's name of a type that is no tensor: a sequence of tensors, or a map.
                 Its dtype is object, as that of the arrays that hold them in feeds (containers.py)
    is_optional  whether a feed may hold None for it, or lack it
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    container: str = ""
    is_optional: bool = False

    @property
    def batch(self) -> int:
        """The samples in one feed of this input: its first axis, or 1 if that is open or empty."""
        first = self.shape[0] if self.shape else None
        return max(first, 1) if isinstance(first, int) else 1

    def __str__(self) -> str:
        if self.container:
            return f"{self.name} {self.container}"
        sizes = ["?" if size is None else str(size) for size in self.shape]
        return f"{self.name} {self.dtype}[{', '.join(sizes)}]"


def did_you_mean(name: str, inputs: Sequence[InputSpec]) -> str:
    """A hint with the input whose name is nearest, if one is near, and with all inputs."""
    near = nearest_hint(name, [spec.name for spec in inputs])
    return f"{near} The model takes {describe_inputs(inputs)}".lstrip()


def describe_inputs(inputs: Sequence[InputSpec]) -> str:
    """The inputs for people, such as `ids int64[N, T], lengths int64[N]`."""
    return ", ".join(map(str, inputs))
