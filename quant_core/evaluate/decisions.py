"""What a model's outputs decide, and how many of the decisions are the same or right.

A decision is the argmax over the last axis (from rank 4 on over axis 1, as in N, C, H, W). A single
score decides whether it is above a threshold. An integer output is its own decision.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Decisions:
    """Numbers of decisions of one output; they add up over blocks of samples and over outputs."""

    total: int = 0
    same: int = 0  # equal to the float model's
    labelled: int = 0  # with a label that is not negative
    right: int = 0
    right_in_float: int = 0
    right_in_both: int = 0

    def __add__(self, other: Decisions) -> Decisions:
        return Decisions(
            self.total + other.total,
            self.same + other.same,
            self.labelled + other.labelled,
            self.right + other.right,
            self.right_in_float + other.right_in_float,
            self.right_in_both + other.right_in_both,
        )

    @property
    def agreement(self) -> float | None:
        """Share of decisions that equal the float model's, None without decisions."""
        return self.same / self.total if self.total else None


def class_axis(x: np.ndarray) -> int | None:
    """The axis whose argmax is the decision, None where each element decides for itself."""
    axis = _score_axis(x)
    return axis if x.dtype.kind == "f" and x.ndim >= 2 and x.shape[axis] > 1 else None


def decide(x: np.ndarray, axis: int | None, threshold: float | None) -> np.ndarray:
    """The decisions of an output (N, ...), -1 where NaN leaves none.

    axis       of the classes, as `class_axis` gives it: the decisions lack it
    threshold  of single scores, which decide 0 or 1; None for integers, which are decisions
    """
    if axis is not None:
        return np.where(np.isnan(x).any(axis), -1, x.argmax(axis))
    if threshold is None:
        return x
    of_scores = _score_axis(x)
    if x.ndim >= 2 and x.shape[of_scores] == 1:
        x = x.squeeze(of_scores)
    return np.where(np.isnan(x), -1, x > threshold)


def count_decisions(
    decisions: np.ndarray, float_decisions: np.ndarray, truth: np.ndarray | None
) -> Decisions:
    """The numbers of one block of samples.

    decisions        of the quantized model, (N,) or (N, T)
    float_decisions  of the float model, in the same shape
    truth            labels in the same shape, negative where there is none; None without labels
    """
    same = int((float_decisions == decisions).sum())
    if truth is None:
        return Decisions(float_decisions.size, same)
    known = truth >= 0
    right = (decisions == truth) & known
    right_in_float = (float_decisions == truth) & known
    return Decisions(
        total=float_decisions.size,
        same=same,
        labelled=int(known.sum()),
        right=int(right.sum()),
        right_in_float=int(right_in_float.sum()),
        right_in_both=int((right & right_in_float).sum()),
    )


def count_classes(decisions: np.ndarray) -> Counter[Any]:
    """How many of the decisions are for each class."""
    classes, counts = np.unique(decisions, return_counts=True)
    return Counter(dict(zip(classes.tolist(), counts.tolist(), strict=True)))


def class_agreement(decided: Counter[Any], differing: Counter[Any]) -> float:
    """Mean share of the float model's decisions for one class that are the same, over its classes.

    So a mask that loses all of a rare class is no better than half right. A class of a few
    decisions says little by itself: each class counts as if it had sqrt(n) / 2 more of the n
    decisions, which is the standard deviation of n flips of a coin, with the share of all.

    decided    by the float model for each class, at least one
    differing  of these

    Source: Brodersen et al., "The balanced accuracy and its posterior distribution", ICPR 2010.
    """
    total = decided.total()
    more = math.sqrt(total) / 2
    share = differing.total() / total
    lost = ((differing[label] + more * share) / (count + more) for label, count in decided.items())
    return 1 - math.fsum(lost) / len(decided)


def aligned_labels(
    labels: np.ndarray | None, start: int, shape: tuple[int, ...]
) -> np.ndarray | None:
    """Labels of `shape[0]` rows from `start` on in the shape of the decisions, None if unfit."""
    if labels is None or labels.dtype.kind not in "iub":
        return None
    rows = labels[start : start + shape[0]].astype(np.int64)
    if len(rows) != shape[0]:
        return None
    if rows.size == math.prod(shape):
        return rows.reshape(shape)
    inside = (slice(None), *(slice(n) for n in shape[1:]))
    if rows.ndim != len(shape) or rows[inside].shape != shape:
        return None
    padding = rows.copy()
    padding[inside] = -1
    return rows[inside] if (padding < 0).all() else None


def _score_axis(x: np.ndarray) -> int:
    """The axis of classes, if there are several: 1 of N, C, H, W, else the last."""
    return 1 if x.ndim >= 4 else x.ndim - 1
