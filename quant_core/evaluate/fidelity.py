"""How close the outputs of a quantized model are to those of its float original, and how right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.data.samples import Samples
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.custom_metric import measure_custom_metric
from quant_core.metrics import MAX_SQNR_DB, OTHER_SHAPE, Fidelity, OutputFidelity
from quant_core.model.session import run
from quant_core.model.spill import SpilledArrays
from quant_core.numerics.sqnr import sqnr_db

Outputs = list[np.ndarray]  # of one feed, in the order of the model's outputs

MAX_STORED_BYTES = 64 << 20  # of the float model's outputs; not tuned
BLOCK_ELEMENTS = 1 << 20  # feeds of one shape are compared together up to this size
MASK = 1e30  # float outputs beyond it are masks ("never this class"), as infinite ones are


def run_each(session: ort.InferenceSession, samples: Samples) -> Iterator[Outputs]:
    """The outputs feed by feed, with one feed in memory at a time.

    Raises: DataError for a bad sample; ModelError if the model does not run.
    """
    return (run(session, feed, samples.where(i)) for i, feed in enumerate(samples))


class StoredOutputs:
    """The outputs of a model for all feeds, for comparing many candidates with.

    Those beyond MAX_STORED_BYTES lie in a file, and are read one feed at a time.
    """

    def __init__(self, outputs: Iterable[Outputs]) -> None:
        self._arrays = SpilledArrays(MAX_STORED_BYTES)
        self._feeds: list[int] = []  # in the names of the arrays
        self.shapes: list[list[tuple[int, ...]]] = []  # of each feed's
        for feed, arrays in enumerate(outputs):
            self._arrays.update({f"{feed}/{i}": x for i, x in enumerate(arrays)})
            self._feeds.append(feed)
            self.shapes.append([x.shape for x in arrays])

    def pick(self, feeds: Iterable[int]) -> StoredOutputs:
        """The outputs for these feeds; the arrays are shared."""
        picked = StoredOutputs(())
        picked._arrays = self._arrays
        for feed in feeds:
            picked._feeds.append(self._feeds[feed])
            picked.shapes.append(self.shapes[feed])
        return picked

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Outputs]:
        return (self[feed] for feed in range(len(self)))

    def __getitem__(self, feed: int) -> Outputs:
        name = self._feeds[feed]
        return [self._arrays[f"{name}/{i}"] for i in range(len(self.shapes[feed]))]


def run_all(session: ort.InferenceSession, samples: Samples) -> list[Outputs]:
    """The outputs of all feeds. Raises: as `run_each`."""
    return list(run_each(session, samples))


def compare(
    reference: Iterable[Outputs],
    outputs: Iterable[Outputs],
    names: Sequence[str],
    labels: np.ndarray | None = None,
    metric: str | None = None,
) -> Fidelity:
    """The fidelity of `outputs`, of the quantized model, to `reference`, of the float model.

    reference, outputs  one list of arrays per feed. Iterators are read once, and only sums are
                        kept, unless `metric` ("module:function") needs everything at once
    names               names of the outputs
    labels              integers in the shape of the decisions of one output, (N,) or (N, T); rows
                        may be padded with negative labels, which are ignored

    A decision is the argmax over the last axis (from rank 4 on over axis 1, as in N, C, H, W). A
    single score decides whether it is above 0.5, if all scores lie in 0..1, or else above 0. An
    integer output is its own decision.

    Raises: DataError if there is nothing to compare, if the labels fit no output, or if the user's
    function fails; ModelError if the numbers of outputs differ.
    """
    if metric is not None:
        reference, outputs = list(reference), list(outputs)
    tallies = [_OutputTally(name) for name in names]
    sample_count = 0
    for float_block, quantized_block, feeds in _blocks(reference, outputs):
        if not len(tallies) == len(float_block) == len(quantized_block):
            problem = f"gives {len(quantized_block)} outputs, float gives {len(float_block)}"
            raise ModelError(problem, hint="Is it the same model?")
        sample_count += _rows(float_block)
        for tally, want, got in zip(tallies, float_block, quantized_block, strict=True):
            tally.add(want, got, labels, feeds)
    if not sample_count:
        raise DataError("nothing to compare", hint="At least one sample")

    labelled = _labelled_output(tallies, labels, required=metric is None)
    deciding = [labelled] if labelled else [t for t in tallies if t.rows == tallies[0].rows]
    decisions = sum((tally.decisions() for tally in deciding), Decisions())
    per_output = tuple(tally.result() for tally in tallies)
    errors = [o.max_abs_error for o in per_output if o.max_abs_error is not None]
    figures: dict[str, Any] = {}
    if labelled:
        figures |= _top1(labelled, labels)
    if metric is not None:
        figures["metric"] = measure_custom_metric(metric, names, list(outputs), labels)
        figures["metric_float"] = measure_custom_metric(metric, names, list(reference), labels)
    return Fidelity(
        per_output=per_output,
        samples=sample_count,
        cosine=_mean([output.cosine for output in per_output]),
        sqnr_db=_mean([output.sqnr_db for output in per_output]),
        max_abs_error=max(errors, default=None),
        agreement=decisions.agreement,
        **figures,
    )


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


class _OutputTally:
    """Sums over the samples of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_float = False
        self.is_compared = False  # a block at least has the float model's shape
        self.shape_flaw = ""
        self.unusable_values = 0  # NaN or infinite where float is not
        self.signals: list[np.ndarray] = []  # sums of squares of each feed: of the float values,
        self.noises: list[np.ndarray] = []  # and of the errors
        self.quantized_squares = self.dot = 0.0
        self.max_error = 0.0
        self.lo, self.hi = math.inf, -math.inf  # of the float model's values
        self.rows = 0
        self.classes = 0
        self.labels_fit = True
        # threshold of single scores (None: argmax, or integers) -> decisions
        self.by_threshold: dict[float | None, Decisions] = {}

    def add(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None, feeds: int) -> None:
        """Add a block of feeds: `want` of the float model, `got` of the quantized one, labels of
        all.
        """
        self.is_float |= want.dtype.kind == "f"
        if got.shape != want.shape:
            self.shape_flaw = f"{OTHER_SHAPE} {got.shape} where float has {want.shape}"
            got = np.full(want.shape, np.nan if want.dtype.kind == "f" else -1)
        elif want.dtype.kind in "fiub":
            self.is_compared = True
            self._add_errors(want.reshape(feeds, -1), got.reshape(feeds, -1))
        self._add_decisions(want, got, labels)

    def _add_errors(self, want: np.ndarray, got: np.ndarray) -> None:
        """Add the values of some feeds, one in each row."""
        signals, noises = np.zeros(len(want)), np.zeros(len(want))
        step = max(1, BLOCK_ELEMENTS // len(want))
        for start in range(0, want.shape[1], step):
            part = slice(start, start + step)
            signal, noise = self._add_errors_of_part(want[:, part], got[:, part])
            signals += signal
            noises += noise
        self.signals.append(signals)
        self.noises.append(noises)

    def _add_errors_of_part(
        self, want: np.ndarray, got: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The sums of squares of each row: of the float values, and of the errors."""
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
        return (w * w).sum(1), (error * error).sum(1)

    def _add_decisions(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None) -> None:
        axis = _class_axis(want)
        is_score = axis is None and want.dtype.kind == "f"
        # which of the two thresholds suits is known once all values have been seen
        for threshold in (0.5, 0.0) if is_score else (None,):
            float_decisions = np.atleast_1d(_decide(want, axis, threshold))
            decisions = np.atleast_1d(_decide(got, axis, threshold))
            truth = self._labels_of(float_decisions, labels)
            counted = _count(decisions, float_decisions, truth)
            self.by_threshold[threshold] = self.by_threshold.get(threshold, Decisions()) + counted
        if axis is not None:
            self.classes = want.shape[axis]
        else:
            self.classes = 2 if is_score else 0
        self.rows += len(float_decisions)

    def _labels_of(self, decisions: np.ndarray, labels: np.ndarray | None) -> np.ndarray | None:
        """The labels of this block, None if they do not fit now or did not fit before."""
        truth = _aligned(labels, self.rows, decisions.shape) if self.labels_fit else None
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
            flaw = f"holds {self.unusable_values} values that are NaN or infinite"
        agreement = self.decisions().agreement
        if not self.is_float:
            integer_db = self._integer_db()
            return OutputFidelity(self.name, *3 * (None,), agreement, flaw, integer_db=integer_db)
        if self.unusable_values or not self.is_compared:
            worst = -MAX_SQNR_DB
            return OutputFidelity(self.name, -1.0, worst, math.inf, agreement, flaw, lower_db=worst)
        return OutputFidelity(
            self.name,
            self._cosine(),
            self._sqnr_db(),
            self.max_error,
            agreement,
            flaw,
            is_probability=bool(self.lo >= 0 and self.hi <= 1),
            lower_db=self._lower_db(),
        )

    def _integer_db(self) -> float | None:
        """SQNR of the numbers, or of the decisions, whichever is higher; None without any."""
        decisions = self.decisions()
        if not decisions.total:
            return None
        differing = decisions.total - decisions.same
        beyond_luck = max(0, differing - 1)  # which of two equal classes wins says nothing
        of_decisions = _within_limits(sqnr_db(decisions.total, beyond_luck))
        return max(of_decisions, self._sqnr_db()) if self.is_compared else of_decisions

    def _cosine(self) -> float:
        """Cosine similarity; of zeros, 1 if both models give zeros and else 0."""
        float_squares = float(np.concatenate(self.signals).sum())
        norms = math.sqrt(float_squares) * math.sqrt(self.quantized_squares)
        if not norms:
            return float(float_squares == self.quantized_squares)
        return max(-1.0, min(1.0, self.dot / norms))

    def _sqnr_db(self) -> float:
        signals, noises = np.concatenate(self.signals), np.concatenate(self.noises)
        return _within_limits(sqnr_db(float(signals.sum()), float(noises.sum())))

    def _lower_db(self) -> float:
        """SQNR with the noise one standard error above what was measured; `_sqnr_db` of one feed.

        Source: Cochran, Sampling Techniques, 3rd ed., section 6.4: the ratio of two sums has the
        variance of what is left where that ratio of the one is taken from the other.
        """
        signals, noises = np.concatenate(self.signals), np.concatenate(self.noises)
        signal, noise, count = float(signals.sum()), float(noises.sum()), len(signals)
        if signal and count > 1:
            left = noises - noise / signal * signals
            noise += math.sqrt(float(left @ left) * count / (count - 1))
        return _within_limits(sqnr_db(signal, noise))


def _within_limits(db: float) -> float:
    return max(-MAX_SQNR_DB, min(MAX_SQNR_DB, db))


# Blocks of feeds


def _blocks(
    reference: Iterable[Outputs], outputs: Iterable[Outputs]
) -> Iterator[tuple[Outputs, Outputs, int]]:
    """Both models' outputs, with feeds of the same shapes joined, and how many these are.

    One call of numpy costs more than a small sum, so that small feeds are worth joining.
    """
    held: list[tuple[Outputs, Outputs]] = []
    held_shapes, held_elements = None, 0
    for pair in zip(reference, outputs, strict=True):
        shapes = [[array.shape for array in side] for side in pair]
        if held and (shapes != held_shapes or held_elements >= BLOCK_ELEMENTS):
            yield *_joined(held), len(held)
            held, held_elements = [], 0
        held.append(pair)
        held_shapes = shapes
        held_elements += sum(array.size for array in pair[0])
    if held:
        yield *_joined(held), len(held)


def _joined(pairs: list[tuple[Outputs, Outputs]]) -> tuple[Outputs, Outputs]:
    """One pair of outputs, each joined along axis 0."""
    float_feeds, quantized_feeds = zip(*pairs, strict=True)
    return _concatenated(float_feeds), _concatenated(quantized_feeds)


def _concatenated(feeds: Sequence[Outputs]) -> Outputs:
    arrays_of_outputs = zip(*feeds, strict=True)
    return [np.concatenate([np.atleast_1d(x) for x in arrays]) for arrays in arrays_of_outputs]


def _rows(outputs: Outputs) -> int:
    """Size of axis 0 of the first output, 1 if it has no axes or there is none."""
    return outputs[0].shape[0] if outputs and outputs[0].ndim else 1


# Decisions and labels


def _class_axis(x: np.ndarray) -> int | None:
    """The axis whose argmax is the decision, None where each element decides for itself."""
    axis = 1 if x.ndim >= 4 else x.ndim - 1
    return axis if x.dtype.kind == "f" and x.ndim >= 2 and x.shape[axis] > 1 else None


def _decide(x: np.ndarray, axis: int | None, threshold: float | None) -> np.ndarray:
    """Class indices, -1 where NaN leaves no decision."""
    if axis is not None:
        return np.where(np.isnan(x).any(axis), -1, x.argmax(axis))
    if threshold is None:
        return x
    class_axis = 1 if x.ndim >= 4 else x.ndim - 1
    if x.ndim >= 2 and x.shape[class_axis] == 1:
        x = x.squeeze(class_axis)
    return np.where(np.isnan(x), -1, x > threshold)


def _count(
    decisions: np.ndarray, float_decisions: np.ndarray, truth: np.ndarray | None
) -> Decisions:
    """Counts of one block; `truth` has the shape of the decisions, None without labels."""
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


def _aligned(labels: np.ndarray | None, start: int, shape: tuple[int, ...]) -> np.ndarray | None:
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


def _labelled_output(
    tallies: Sequence[_OutputTally], labels: np.ndarray | None, *, required: bool
) -> _OutputTally | None:
    """The first output whose decisions the labels fit, None without labels.

    Raises: DataError if the labels fit no output and `required`, or if all labels are negative.
    """
    if labels is None or labels.dtype.kind not in "iub":
        return None
    fitting = [t for t in tallies if t.labels_fit and t.rows == len(labels)]
    if not fitting and required:
        rows = ", ".join(f"{tally.name} {tally.rows} rows" for tally in tallies)
        hint = (
            f"Decisions are (N,) or (N, T), here {rows}; for anything else give a metric "
            "module:function"
        )
        raise DataError(f"labels of shape {labels.shape} fit no output", "labels", hint)
    if fitting and not fitting[0].decisions().labelled:
        problem = "all labels are below zero, which means ignored"
        raise DataError(problem, "labels", "Class indices from 0 on")
    return fitting[0] if fitting else None


def _top1(tally: _OutputTally, labels: np.ndarray | None) -> dict[str, Any]:
    found = tally.decisions()
    classes = tally.classes
    if not classes and labels is not None:
        classes = len(np.unique(labels[labels >= 0]))
    top1_float = found.right_in_float / found.labelled
    return {
        "top1": found.right / found.labelled,
        "top1_float": top1_float,
        "flips_bad": found.right_in_float - found.right_in_both,
        "flips_good": found.right - found.right_in_both,
        "note": _chance_note(top1_float, classes, found.labelled),
    }


def _chance_note(top1_float: float, classes: int, labels: int) -> str:
    """A warning if the float model is no better than guessing, "" otherwise.

    That is a top-1 within three standard deviations of 1 / classes, or hardly above it.
    """
    chance = 1 / max(classes, 1)
    deviation = math.sqrt(chance * (1 - chance) / labels)
    margin = max(3 * deviation, min(chance / 2, 0.1))
    if classes < 2 or top1_float > chance + margin:
        return ""
    return (
        f"float top1 {top1_float:.3f} is what guessing among {classes} classes gives: "
        "check labels and preprocessing"
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
