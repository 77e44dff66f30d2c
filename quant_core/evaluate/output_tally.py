"""Sums over the samples of one output, and the fidelity that follows from them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from quant_core.evaluate.decisions import (
    Decisions,
    aligned_labels,
    class_agreement,
    class_axis,
    count_classes,
    count_decisions,
    decide,
)
from quant_core.metrics import MAX_SQNR_DB, OutputFidelity
from quant_core.numerics.sqnr import (
    LEAST_VARIATION,
    decisions_db,
    lower_sqnr_db,
    sqnr_db,
    upper_decisions_db,
    within_limits,
)
from quant_core.text import counted

BLOCK_ELEMENTS = 1 << 20  # of the float values of feeds that are joined
PART_ELEMENTS = 1 << 15  # of those that are compared at once: what is computed stays in the cache
MASK = 1e30  # float outputs beyond it are masks ("never this class"), as infinite ones are


class OutputTally:
    """Sums over the samples of one output; `result` is the fidelity that follows from them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_float = False
        self.is_compared = False  # a block at least has the float model's shape
        self.shape_flaw = ""
        self.unusable_values = 0  # NaN or infinite where float is not
        self.sums: list[np.ndarray] = []  # (4, feeds), see _sums
        self.quantized_squares = self.dot = 0.0
        self.max_error = 0.0
        self.lo, self.hi = math.inf, -math.inf  # of the float model's values
        self.rows = 0
        self.classes = 0
        self.labels_fit = True
        self.decided: list[np.ndarray] = []  # numbers of decisions of each feed, of integers:
        self.differing: list[np.ndarray] = []  # of all, and of those that differ
        self.decided_by_class: Counter[Any] = Counter()  # the same of all feeds
        self.differing_by_class: Counter[Any] = Counter()
        # threshold of single scores (None: argmax, or integers) -> decisions
        self.by_threshold: dict[float | None, Decisions] = {}

    def add(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None, feeds: int) -> None:
        """Add a block of feeds: `want` of the float model, `got` of the quantized one, labels of
        all.
        """
        self.is_float |= want.dtype.kind == "f"
        if got.shape != want.shape:
            self.shape_flaw = f"has shape {got.shape} where float has {want.shape}"
            got = np.full(want.shape, np.nan if want.dtype.kind == "f" else -1)
        elif want.dtype.kind in "fiub":
            self.is_compared = True
            self._add_errors(want.reshape(feeds, -1), got.reshape(feeds, -1))
        if want.dtype.kind != "f":
            differs = got != want
            of_feeds = differs.reshape(feeds, -1)
            self.decided.append(np.full(feeds, of_feeds.shape[1], np.float64))
            self.differing.append(of_feeds.sum(1).astype(np.float64))
            self.decided_by_class.update(count_classes(want))
            self.differing_by_class.update(count_classes(want[differs]))
        self._add_decisions(want, got, labels)

    def _add_errors(self, want: np.ndarray, got: np.ndarray) -> None:
        """Add the values of some feeds, one in each row."""
        sums = np.zeros((4, len(want)))
        step = max(1, PART_ELEMENTS // len(want))
        for start in range(0, want.shape[1], step):
            part = slice(start, start + step)
            sums += self._add_errors_of_part(want[:, part], got[:, part])
        self.sums.append(sums)

    def _add_errors_of_part(self, want: np.ndarray, got: np.ndarray) -> np.ndarray:
        """(4, feeds), see _sums."""
        with np.errstate(invalid="ignore", over="ignore"):  # MASK is inf in float16
            known = np.abs(want) < MASK
        w = np.where(known, want, 0).astype(np.float64)
        self.lo = min(self.lo, w.min(initial=math.inf, where=known))
        self.hi = max(self.hi, w.max(initial=-math.inf, where=known))
        usable = known & np.isfinite(got)
        self.unusable_values += int(known.sum() - usable.sum())
        g = np.where(usable, got, w).astype(np.float64)
        error = g - w
        self.quantized_squares += float((g * g).sum())
        self.dot += float((w * g).sum())
        self.max_error = max(self.max_error, float(np.abs(error).max(initial=0.0)))
        return np.stack([(w * w).sum(1), (error * error).sum(1), known.sum(1), w.sum(1)])

    def _add_decisions(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None) -> None:
        axis = class_axis(want)
        is_score = axis is None and want.dtype.kind == "f"
        # which of the two thresholds suits is known once all values have been seen
        for threshold in (0.5, 0.0) if is_score else (None,):
            float_decisions = np.atleast_1d(decide(want, axis, threshold))
            decisions = np.atleast_1d(decide(got, axis, threshold))
            truth = self._labels_of(float_decisions, labels)
            counted = count_decisions(decisions, float_decisions, truth)
            self.by_threshold[threshold] = self.by_threshold.get(threshold, Decisions()) + counted
        if axis is not None:
            self.classes = want.shape[axis]
        else:
            self.classes = 2 if is_score else 0
        self.rows += len(float_decisions)

    def _labels_of(self, decisions: np.ndarray, labels: np.ndarray | None) -> np.ndarray | None:
        """The labels of this block, None if they do not fit now or did not fit before."""
        truth = aligned_labels(labels, self.rows, decisions.shape) if self.labels_fit else None
        self.labels_fit = truth is not None and decisions.dtype.kind in "iub"
        return truth if self.labels_fit else None

    def decisions(self) -> Decisions:
        """The decisions at the threshold that suits the float model's scores."""
        unused = 0.0 if self.lo >= 0 and self.hi <= 1 else 0.5
        used = [found for threshold, found in self.by_threshold.items() if threshold != unused]
        return sum(used, Decisions())

    def result(self) -> OutputFidelity:
        flaw = self.shape_flaw
        if not flaw and self.unusable_values:
            flaw = f"holds {counted(self.unusable_values, 'NaN or infinite value')}"
        found = self._of_floats() if self.is_float else self._of_integers()
        agreement, is_reshaped = self.decisions().agreement, bool(self.shape_flaw)
        return replace(found, agreement=agreement, flaw=flaw, is_reshaped=is_reshaped)

    def _of_floats(self) -> OutputFidelity:
        """How near the values of a float output are."""
        if self.unusable_values or not self.is_compared:
            db = -MAX_SQNR_DB
            return OutputFidelity(self.name, -1.0, db, math.inf, centred_db=db, lower_db=db)
        signals, noises, *_ = self._sums()
        centred = self._centred_signals()
        if centred.sum() < LEAST_VARIATION**2 * signals.sum():
            centred = signals
        return OutputFidelity(
            self.name,
            self._cosine(),
            _sqnr_db(signals, noises),
            self.max_error,
            float_range=(float(self.lo), float(self.hi)),
            centred_db=_sqnr_db(centred, noises),
            lower_db=within_limits(lower_sqnr_db(centred, noises)),
        )

    def _of_integers(self) -> OutputFidelity:
        """The fidelity of an output of integers: SQNR of the numbers around their mean or of the
        decisions, whichever is higher, and the most that the decisions may reach by chance.
        """
        totals, differing = np.concatenate(self.decided), np.concatenate(self.differing)
        total = float(totals.sum())
        if not total:
            return OutputFidelity(self.name)
        share = float(differing.sum()) / total
        of_classes = class_agreement(self.decided_by_class, self.differing_by_class)
        if share:  # what differs counts as often as it does among the mean class
            totals = totals * min(1.0, share / (1 - of_classes))
        of_numbers = -MAX_SQNR_DB
        if self.is_compared:
            of_numbers = _sqnr_db(self._centred_signals(), self._sums()[1])
        of_decisions = within_limits(decisions_db(float(totals.sum()), float(differing.sum())))
        upper = within_limits(upper_decisions_db(totals, differing))
        return OutputFidelity(
            self.name,
            integer_db=max(of_numbers, of_decisions),
            upper_integer_db=max(of_numbers, upper),
            class_agreement=of_classes,
        )

    def _cosine(self) -> float:
        """Cosine similarity; of zeros, 1 if both models give zeros and else 0."""
        float_squares = float(self._sums()[0].sum())
        norms = math.sqrt(float_squares) * math.sqrt(self.quantized_squares)
        if not norms:
            return float(float_squares == self.quantized_squares)
        return max(-1.0, min(1.0, self.dot / norms))

    def _centred_signals(self) -> np.ndarray:
        """The sum of squares of each feed's float values, around the mean of all."""
        signals, _, counts, sums = self._sums()
        mean = float(sums.sum() / max(1.0, counts.sum()))
        around: np.ndarray = signals - 2 * mean * sums + mean**2 * counts
        return around.clip(0.0)

    def _sums(self) -> np.ndarray:
        """(4, feeds): sums of squares of the float values and of the errors, how many float values
        there are, and their sums.
        """
        return np.concatenate(self.sums, axis=1)


def _sqnr_db(signals: np.ndarray, noises: np.ndarray) -> float:
    return within_limits(sqnr_db(float(signals.sum()), float(noises.sum())))
