"""A model that computes the same with less work: the rules, until none finds anything more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.model.session import open_session, run
from quant_core.optimize.applied import Applied
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules import RULES, Rule

SAME_DB = 60.0  # below this, an output changed by more than float32 rounding explains
NO_NOISE = 1e-14  # mean square error of outputs near zero, where a ratio means nothing
GROWTH = 0.01  # of the file, for names and small constants; what grows by more holds more weights
SLACK_BYTES = 4096  # the same in a file of nothing but nodes
LEAST_GAIN = 1.02  # a speed-up that is not the noise of the clock
ROUNDS = 8  # a rule that finds something new after so many others is left

Feed: TypeAlias = Mapping[str, NDArray[Any]]
Speedup: TypeAlias = Callable[[ir.Model, ir.Model], float]


@dataclass(frozen=True, slots=True)
class Undone:
    """A rule whose changes were taken back, and why."""

    rule: str
    nodes: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Optimized:
    """The model after all rules, what each changed, and what was tried in vain."""

    model: ir.Model
    applied: tuple[Applied, ...]
    undone: tuple[Undone, ...]

    @property
    def names(self) -> dict[str, str]:
        """For every node that is gone, the node that does its work now."""
        found: dict[str, str] = {}
        for change in self.applied:
            for name in change.absorbed:
                if name != change.node:
                    found[name] = change.node
        return {name: _last(name, found) for name in found}


def _last(name: str, found: Mapping[str, str]) -> str:
    seen = {name}
    while name in found and found[name] not in seen:
        name = found[name]
        seen.add(name)
    return name


def optimize(
    model: ir.Model, feeds: Sequence[Feed] = (), speedup: Speedup | None = None
) -> Optimized:
    """The model after every rule of RULES that keeps its outputs, its speed and its size.

    model    normalized; it is not changed
    feeds    outputs are compared on these; without any, the rules are trusted
    speedup  time of its first model over that of its second; without it, timed rules are not tried

    1. Rules are applied in order, again and again, until none changes anything.
    2. What a rule changed is undone if an output differs by more than rounding, or the file grows.
    3. What a timed rule changed is undone if the model is not faster.
    4. A rule that was undone is not tried again.

    Raises: ModelError if the model itself does not run on the feeds.
    """
    reference = _outputs(model, feeds)
    best, applied, undone = model, list[Applied](), list[Undone]()
    for _ in range(ROUNDS):  # 1.
        before = len(applied)
        for name, rule in RULES.items():
            if name in {u.rule for u in undone} or (rule.timed and speedup is None):  # 4.
                continue
            trial = best.clone()
            changes = rule.apply(trial, Facts.of(trial))
            if not changes:
                continue
            graph.drop_unused(trial)
            reason = _objection(rule, best, trial, reference, feeds, speedup)  # 2. 3.
            if reason:
                undone.append(Undone(name, tuple(c.node for c in changes), reason))
            else:
                best = trial
                applied += changes
        if len(applied) == before:
            break
    return Optimized(best, tuple(applied), tuple(undone))


def _objection(
    rule: Rule, before: ir.Model, after: ir.Model, reference: list[list[NDArray[Any]]],
    feeds: Sequence[Feed], speedup: Speedup | None,
) -> str:  # fmt: skip
    """Why the change cannot stay, "" if it can."""
    try:
        outputs = _outputs(after, feeds)
    except ModelError as error:
        return f"it does not run: {error.problem}"
    for wanted, got in zip(reference, outputs, strict=True):
        for a, b in zip(wanted, got, strict=True):
            db = same_db(a, b)
            if db < SAME_DB:
                return f"an output changes to {db:.0f} dB"
    size = files.size_in_file(before)
    if files.size_in_file(after) > size + max(SLACK_BYTES, GROWTH * size):
        return "the file grows"
    if rule.timed and speedup is not None:
        gain = speedup(before, after)
        if gain < LEAST_GAIN:
            return f"{gain:.2f}x of the speed"
    return ""


def _outputs(model: ir.Model, feeds: Sequence[Feed]) -> list[list[NDArray[Any]]]:
    if not feeds:
        return []
    session = open_session(model)
    return [run(session, feed) for feed in feeds]


def same_db(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Signal over difference in dB: infinite if equal, -infinite if the kind of result differs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return -np.inf
    if a.dtype.kind != "f":
        return np.inf if (a == b).all() else -np.inf
    finite = np.isfinite(a)
    if not (finite == np.isfinite(b)).all():
        return -np.inf
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    noise, power = float(np.square(x - y).sum()), float(np.square(x).sum())
    if noise <= NO_NOISE * x.size:
        return np.inf
    return float(10 * np.log10(max(power, 1e-300) / noise))
