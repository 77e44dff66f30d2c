"""A model that computes the same with less work: the rules, until none finds anything more."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, groupby, islice
from typing import TypeAlias

import onnx_ir as ir

from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.model.session import Feed, open_session
from quant_core.model.unused import drop_unused
from quant_core.optimize.applied import Applied, former_names
from quant_core.optimize.edit import names_known
from quant_core.optimize.facts import Facts
from quant_core.optimize.opened import OpenedModel
from quant_core.optimize.rules import EXACT, PRUNE, TIMED
from quant_core.optimize.same import Outputs, chooses_from_the_same, outputs_of, why_different

GROWTH = 0.01  # of the file, for names and small constants; what grows by more holds more weights
SLACK_BYTES = 4096  # the same in a file of nothing but nodes
TIMED_SLACK_BYTES = 1 << 17  # the same for what is measured to be faster
LEAST_GAIN = 1.02  # a speed-up that is not the noise of the clock
MOST_PLACES = 6  # that are tried one by one
WORSE = 0.98  # speed of all places together below which some may still be faster
ROUNDS = 8  # a rule that finds something new after so many others is left

Speedup: TypeAlias = Callable[[OpenedModel, OpenedModel], float]


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
        """Node that is gone -> the node that does its work now."""
        return {name: node for node, names in former_names(self.applied).items() for name in names}


def optimize(
    model: ir.Model,
    feeds: Sequence[Feed] = (),
    speedup: Speedup | None = None,
    rules: Iterable[str] | None = None,
    deadline: Deadline = NO_DEADLINE,
    *,
    timed: Iterable[str] = tuple(TIMED),
) -> Optimized:
    """The model after every rule that keeps its outputs, its speed and its size.

    model     normalized; it is not changed
    feeds     outputs are compared on these; without any, the rules are trusted as long as
              onnxruntime loads what they make
    speedup   time of its first model over that of its second; without it, timed rules are not tried
    rules     names of those that need no clock; None: EXACT
    deadline  when it should end with what it has
    timed     names of the timed rules that are tried

    1. Rules are applied in order, again and again, until none changes anything.
    2. What a rule changed is undone if an output differs by more than rounding, or the file grows;
       of outputs behind a choice among results, these are compared where they differ.
       The rules that need no clock are tried all at once first, and one by one if that fails.
    3. What a timed rule changed is undone if the model is not faster; where it is slower, each
       place is tried alone.
    4. A rule that was undone is not tried again.

    Raises: ModelError if a rule finds something, and the model itself does not run on the feeds.
    """
    if deadline.is_over:
        return Optimized(model, (), ())
    work = _Work(feeds, speedup, deadline, OpenedModel(model), Facts.of(model))
    exact = [*(EXACT if rules is None else rules)]
    names = (*exact, *(timed if speedup is not None else ()))
    # How many rules in a row have changed nothing.
    idle = 0 if work.attempt_together(exact) else len(exact)  # 2.
    for name in islice(cycle(names), idle, ROUNDS * len(names)):  # 1.
        if idle >= len(names):
            break
        before = len(work.applied)
        if name not in {u.rule for u in work.undone}:  # 4.
            work.attempt(name)
        idle = idle + 1 if len(work.applied) == before else 0
    if not feeds and work.applied and (problem := _why_not_loaded(work.best.model)):
        undone = (Undone(a.rule, (a.node,), problem) for a in work.applied)
        return Optimized(model, (), (*work.undone, *undone))
    return Optimized(work.best.model, tuple(work.applied), tuple(work.undone))


def follow(model: ir.Model, changes: Sequence[Applied]) -> ir.Model:
    """The model after these changes, which `optimize` found for it: the same, to the last byte.

    Raises: ModelError if they cannot be made, because they are another model's.
    """
    left = list(changes)
    while left:
        rule, rows = next(groupby(left, key=lambda change: change.rule))
        model = model.clone()
        made = _apply(rule, model, Facts.of(model), {row.node for row in rows})
        if not made or made != left[: len(made)]:
            raise ModelError(
                f"{rule} finds other nodes than the plan names",
                left[0].node,
                "Is it the plan of another model?",
            )
        left = left[len(made) :]
    return model


def _apply(
    rule: str, model: ir.Model, facts: Facts, chosen: Collection[str] | None = None
) -> list[Applied]:
    """Apply a rule to the model in place; what it changed. None chooses every node."""
    exact = next((rules[rule] for rules in (EXACT, *PRUNE.values()) if rule in rules), None)
    if exact is None and rule not in TIMED:
        raise ModelError(f"no rule is called {rule}", hint="Is the plan of another version?")
    with names_known(model):
        if exact is not None:
            changes = exact(model, facts)
        else:
            changes = TIMED[rule](model, facts, lambda name: chosen is None or name in chosen)
    if changes:
        drop_unused(model)
    return changes


@dataclass
class _Work:
    """The best model so far, what is known of its tensors, and how it came to be.

    copy  of the best model, to be changed; None: there is none yet
    """

    feeds: Sequence[Feed]
    speedup: Speedup | None
    deadline: Deadline
    best: OpenedModel
    facts: Facts
    applied: list[Applied] = field(default_factory=list)
    undone: list[Undone] = field(default_factory=list)
    copy: ir.Model | None = None

    @cached_property
    def reference(self) -> Outputs:
        """The outputs of the model that rules began with: of the best one before any is kept; or of
        the last one that chooses otherwise among close results.
        """
        return outputs_of(self.best, self.feeds)

    def attempt_together(self, rules: Iterable[str]) -> bool:
        """Keep what all of the rules do to the model, one after the other, if all of it can stay:
        most rules do no harm, and so the model is opened and run once. Whether they found anything.
        """
        after, facts, size = self.best.model.clone(), self.facts, 0
        changes: list[Applied] = []
        for rule in rules:
            if not (found := _apply(rule, after, facts)):
                continue
            before = size or self.best.size_bytes
            size = files.size_in_file(after)
            if _grows(before, size, SLACK_BYTES):
                return True
            changes += found
            facts = Facts.of(after)
        if changes:
            self._keep_if_better(after, changes, is_timed=False)
        else:
            self.copy = after
        return bool(changes)

    def attempt(self, rule: str) -> None:
        """Keep what the rule does to the model, or some of it, or note why not."""
        if self.deadline.is_over:
            return
        # Most rules find nothing, and leave the copy for the next one.
        after = self.copy or self.best.model.clone()
        changes = _apply(rule, after, self.facts)
        self.copy = None if changes else after
        if not changes:
            return
        is_timed = rule in TIMED
        reason, gain = self._keep_if_better(after, changes, is_timed=is_timed)
        if not reason:
            return
        nodes = tuple(change.node for change in changes)
        self.undone.append(Undone(rule, nodes, reason))
        if gain < WORSE and 1 < len(nodes) <= MOST_PLACES:  # 3.
            for node in nodes:
                if self.deadline.is_over:
                    return
                after = self.best.model.clone()
                changes = _apply(rule, after, self.facts, {node})
                if changes:
                    self._keep_if_better(after, changes, is_timed=is_timed)

    def _keep_if_better(
        self, after: ir.Model, changes: list[Applied], *, is_timed: bool
    ) -> tuple[str, float]:
        """Keep what rules made of the best model; or why it cannot stay, "" if it can. And the
        speed-up, 1 if it was not measured.

        is_timed  whether it stays only if it is faster
        """
        opened, reference = OpenedModel(after), self.reference
        try:
            outputs = outputs_of(opened, self.feeds)
            reason = why_different(reference, outputs)
            if reason and not chooses_from_the_same(self.best, opened, self.feeds):
                return reason, 1.0
        except ModelError as error:
            return f"it does not run: {error.problem}", 1.0
        slack = TIMED_SLACK_BYTES if is_timed else SLACK_BYTES
        if _grows(self.best.size_bytes, opened.size_bytes, slack):
            return "the file grows", 1.0
        if is_timed and self.speedup is not None:
            gain = self.speedup(self.best, opened)
            if gain < LEAST_GAIN:
                return f"{gain:.2f}x of the speed", gain
        self.best, self.facts, self.copy = opened, Facts.of(after), None
        if reason:
            self.reference = outputs
        self.applied += changes
        return "", 1.0


def _grows(before: int, after: int, slack: int) -> bool:
    """Whether a file of so many bytes grows by more than names and small constants."""
    return after > before + max(slack, GROWTH * before)


def _why_not_loaded(model: ir.Model) -> str:
    """Why onnxruntime refuses the model, "" if it does not.

    It infers shapes from constants, and demands scalars of Range that it takes in another shape
    where they are computed.
    """
    try:
        open_session(model, optimize=False)
    except ModelError as error:
        return f"it does not load: {error.problem}"
    return ""
