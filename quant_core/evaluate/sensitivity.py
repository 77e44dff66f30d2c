"""How much the quantization of each node costs, as a signal-to-noise ratio of its output.

The noise is kept as sums of squares for each sample, so that workers can measure shares of the
samples: the sensitivity of all samples is the same to the last bit, however they were shared out.
This file needs no onnxruntime, so that a flow can merge what its workers measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from quant_core.metrics import MAX_SQNR_DB
from quant_core.numerics.sqnr import sqnr_db, within_limits


@dataclass(frozen=True, slots=True)
class NodeNoise:
    """Sums of squares over the output of one node, one number per sample.

    signal      of the float model's values
    isolated    of the change that the quantized node makes, given the float model's inputs
    cumulative  of the change in the quantized model, where all nodes before it are quantized too
    """

    node: str
    op_type: str
    signal: tuple[float, ...]
    isolated: tuple[float, ...]
    cumulative: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Signal-to-quantization-noise ratios of the output of one node, in dB, at most 200.

    isolated_db    with the float model's inputs: what the node itself costs
    cumulative_db  in the quantized model: what the node and all before it cost
    """

    node: str
    op_type: str
    isolated_db: float
    cumulative_db: float


def sensitivities(parts: Iterable[Iterable[NodeNoise]]) -> list[Sensitivity]:
    """The sensitivities over all samples of all parts, without nodes that change nothing.

    The nodes are in the order of the first part that has them. A node whose float output is zero
    in all samples is left out. `math.fsum` rounds once, so that the order of parts does not matter.
    """
    noises_of: dict[str, list[NodeNoise]] = {}
    for part in parts:
        for noise in part:
            noises_of.setdefault(noise.node, []).append(noise)
    found = []
    for node, noises in noises_of.items():
        signal = math.fsum(x for noise in noises for x in noise.signal)
        if not signal:
            continue
        isolated = math.fsum(x for noise in noises for x in noise.isolated)
        cumulative = math.fsum(x for noise in noises for x in noise.cumulative)
        isolated_db, cumulative_db = _ratio_db(signal, isolated), _ratio_db(signal, cumulative)
        if isolated_db < MAX_SQNR_DB:
            found.append(Sensitivity(node, noises[0].op_type, isolated_db, cumulative_db))
    return found


def _ratio_db(signal: float, noise: float) -> float:
    return -MAX_SQNR_DB if math.isinf(noise) else within_limits(sqnr_db(signal, noise))
