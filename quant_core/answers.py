"""What the functions of api.py and judging.py answer, beside a `QuantResult`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from quant_core.evaluate.kernels import Kernel
from quant_core.evaluate.timing import Timing
from quant_core.metrics import Fidelity


@dataclass(frozen=True, slots=True)
class OptimizeResult:
    """What was rewritten in a float model, and what was tried in vain.

    rewrites  one row for each change: rule, node, and the absorbed nodes
    undone    one row for each rule that was taken back: rule, nodes and reason
    note      that the file is larger than its original, or a copy of it, if it is
    """

    output: str
    size_bytes: int
    float_size_bytes: int
    rewrites: list[dict[str, Any]]
    undone: list[dict[str, Any]]
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Validation:
    """A quantized model against its float original, and against its contract if it has one.

    verdict      met, not_met or none
    saturation   the nodes that give other results on x86 without VNNI
    sensitivity  of each node in dB: what it costs alone, and what has added up by then; only if
                 requested
    """

    fidelity: Fidelity
    verdict: str
    reason: str
    saturation: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"fidelity": self.fidelity.to_dict()}


@dataclass(frozen=True, slots=True)
class Compared:
    """One of several files of a model: its size in bytes, how right and how fast it is."""

    file: str
    size_bytes: int
    fidelity: Fidelity
    timing: Timing

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "file": self.file,
            "size_bytes": self.size_bytes,
            "fidelity": self.fidelity.to_dict(),
            "timing": self.timing.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class ExplainedKernel:
    """A kernel, and what is to be known about it.

    saturating_pairs  pairs of its weights whose sums can saturate on x86 CPUs without VNNI
    advice            what quantmill's plan does with its node
    """

    kernel: Kernel
    saturating_pairs: int
    advice: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """The kernels that run a model on this CPU, in their order."""

    model: str
    is_quantized: bool
    kernels: tuple[ExplainedKernel, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with each kernel's share of the time, and each arithmetic's."""
        total = sum(row.kernel.ms for row in self.kernels) or 1.0
        shares: dict[str, float] = {}
        for row in self.kernels:
            arithmetic = str(row.kernel.arithmetic)
            shares[arithmetic] = shares.get(arithmetic, 0.0) + row.kernel.ms / total
        kernels = [
            {
                **asdict(row.kernel),
                "covers": list(row.kernel.covers),
                "share": row.kernel.ms / total,
                "saturating_pairs": row.saturating_pairs,
                "advice": row.advice,
            }
            for row in self.kernels
        ]
        return {
            "model": self.model,
            "is_quantized": self.is_quantized,
            "ms": total,
            "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
            "kernels": kernels,
        }
