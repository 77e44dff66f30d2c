"""Whether a rewritten model computes the same as before, but for the rounding of float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model.choices import behind_choices, chosen_from
from quant_core.model.containers import numbers_of
from quant_core.model.session import Feed, open_session, run
from quant_core.numerics.sqnr import difference_db
from quant_core.optimize.opened import OpenedModel

SAME_DB = 60.0  # below this, an output changed by more than float32 rounding explains
NO_NOISE = 1e-14  # mean square error of outputs near zero, where a ratio means nothing

Outputs: TypeAlias = list[list[NDArray[Any]]]  # the numbers of all outputs, feed by feed


def outputs_of(model: OpenedModel, feeds: Sequence[Feed]) -> Outputs:
    """What the model gives. Raises: ModelError if it does not run."""
    return [[numbers_of(x) for x in run(model.session, feed)] for feed in feeds]


def why_different(wanted: Outputs, got: Outputs) -> str:
    """Why the second outputs are not the first, "" if they are."""
    pairs = zip(wanted, got, strict=True)
    worst_db = min(
        (_same_db(a, b) for both in pairs for a, b in zip(*both, strict=True)), default=np.inf
    )
    return f"an output changes to {worst_db:.0f} dB" if worst_db < SAME_DB else ""


def chooses_from_the_same(before: OpenedModel, after: OpenedModel, feeds: Sequence[Feed]) -> bool:
    """Whether both models end in one choice among results, and these are the same.

    Of close results, rounding changes which of them come first. What is behind the choice is not
    compared then, and so no node of it may have changed.

    Raises: ModelError if a model does not run.
    """
    names = chosen_from(before.model)
    if not names or _ending(before.model) != _ending(after.model):
        return False
    results = []
    for model in (before.model, after.model):
        behind = {v.name for node in behind_choices(model) for v in node.outputs}
        others = [str(v.name) for v in model.graph.outputs if v.name not in behind]
        inner = [name for name in names if name not in others]
        session = open_session(model, outputs=inner)
        results.append([run(session, feed, outputs=[*others, *inner]) for feed in feeds])
    return not why_different(*results)


def _ending(model: ir.Model) -> list[bytes]:
    """The nodes from the choice on: operator, names and attributes of each."""
    ending = behind_choices(model)
    return [
        ir.to_proto(n).SerializeToString(deterministic=True) for n in model.graph if n in ending
    ]


def _same_db(a: NDArray[Any], b: NDArray[Any]) -> float:
    """As `difference_db`; tensors that are no floats are equal or infinitely different."""
    if a.dtype == b.dtype and a.dtype.kind == "f":
        return difference_db(a, b, NO_NOISE)
    return np.inf if a.dtype == b.dtype and np.array_equal(a, b) else -np.inf
