"""How many weights share one scale.

Source: the words are those of torchao's `granularity.py`; the shapes are those of ONNX's
DequantizeLinear, opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for the whole weight: rows (C, K), scale ()."""


@dataclass(frozen=True, slots=True)
class PerChannel:
    """One scale per output channel: rows (C, K), scale (C,)."""


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale per `size` neighbours of an output channel: rows (C, K), scales (C, K / size).

    may_be_uneven  in 4 bits, numbers may lie denser around 0 where that fits the weight (levels.py)
    """

    size: int
    may_be_uneven: bool = False


@dataclass(frozen=True, slots=True)
class BothAxes:
    """One scale for a matrix whose rows and columns both are output channels, of products with it
    and with its transpose: scale ().
    """


Granularity = PerTensor | PerChannel | PerBlock | BothAxes
