"""What a quantized model still gets right, told against its float original."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.config import Contract
from quant_core.data.samples import Samples
from quant_core.errors import DataError, ModelError, RequestError
from quant_core.metrics import Fidelity, OutputFidelity, find_metric
from quant_core.model.session import run

Outputs = list[np.ndarray]  # of one feed
CustomMetric = Callable[[dict[str, Any], np.ndarray | None], float]

SQNR_CAP = 200.0  # dB of identical outputs; its negative where an output is broken
BLOCK_ELEMENTS = 1 << 20  # feeds of one shape are compared together up to this size
MASK = 1e30  # outputs beyond it are masks ("never this class"), as infinite ones are
NO_DECISIONS = np.zeros(
    6, np.int64
)  # all, same as float's, labelled, right, right in float, right in both
SLACK = 1e-9  # 0.985 - 0.975 is a little more than 0.01 in binary


def run_each(session: ort.InferenceSession, samples: Samples) -> Iterator[Outputs]:
    """Outputs feed by feed, one alive at a time. Raises: DataError for a bad sample, ModelError if it does not run."""
    return (run(session, feed, samples.where(i)) for i, feed in enumerate(samples))


def run_all(session: ort.InferenceSession, samples: Samples) -> list[Outputs]:
    """Outputs of all feeds, to compare many candidates with. Raises: as `run_each`."""
    return list(run_each(session, samples))


def compare(
    reference: Iterable[Outputs],
    outputs: Iterable[Outputs],
    names: Sequence[str],
    labels: np.ndarray | None = None,
    metric: str | None = None,
) -> Fidelity:
    """How near `outputs` of the quantized model are to those of the float one, and how right both are.

    Both may be iterators: only sums are kept, unless `metric` ("module:function") wants to see everything.
    A decision is the argmax over the last axis (axis 1 from rank 4 on: N, C, H, W), or for a single score whether it
    is above 0.5 (if all scores lie in 0..1) or 0; an integer output is its own decision. Whole-number labels have the
    shape of the decisions of one output, (N,) or (N, T); rows may be padded with ignored labels.

    Raises: DataError if the labels fit no output, or your function fails; ModelError if the numbers of outputs differ.
    """
    if metric is not None:
        reference, outputs = list(reference), list(outputs)
    tallies = [_Tally(name) for name in names]
    count = 0
    for wanted, got in _blocks(reference, outputs):
        if not len(tallies) == len(wanted) == len(got):
            raise ModelError(
                f"gives {len(got)} outputs, float gives {len(wanted)}", hint="Is it the same model?"
            )
        count += max((a.shape[0] for a in wanted[:1] if a.ndim), default=1)
        for tally, w, g in zip(tallies, wanted, got, strict=True):
            tally.update(w, g, labels)
    if not count:
        raise DataError("nothing to compare", hint="At least one sample")

    judged = _judged(tallies, labels, required=metric is None)
    deciding = [judged] if judged else [t for t in tallies if t.rows == tallies[0].rows]
    decisions = sum((t.counts() for t in deciding), NO_DECISIONS)
    per_output = tuple(t.result() for t in tallies)
    return Fidelity(
        per_output=per_output,
        samples=count,
        cosine=_mean([o.cosine for o in per_output]),
        sqnr_db=_mean([o.sqnr_db for o in per_output]),
        max_abs_error=max(
            (o.max_abs_error for o in per_output if o.max_abs_error is not None), default=None
        ),
        agreement=float(decisions[1] / decisions[0]) if decisions[0] else None,
        **(_top1(judged, labels) if judged else {}),
        **(
            _measure(metric, names, list(reference), list(outputs), labels)
            if metric is not None
            else {}
        ),
    )


def score(fidelity: Fidelity, name: str) -> tuple[float, float | None]:
    """Value of a contract's metric, and the float model's own value if that means something.

    Raises: DataError if the metric was not measured.
    """
    metric = find_metric(name)
    value = metric.value(fidelity)
    if value is None:
        raise DataError("was not measured", name, metric.missing)
    return value, metric.of_float(fidelity) if metric.of_float is not None else None


def judge(
    fidelity: Fidelity,
    contract: Contract,
    *,
    speedup: float | None = None,
    size_ratio: float | None = None,
) -> tuple[str, str]:
    """("met" or "not_met", the reason in one line). Speed and size are judged where they are given.

    A broken output never meets a contract. Raises: DataError as `score`.
    """
    value, of_float = score(fidelity, contract.metric)
    kept: list[str] = []
    missed = list(fidelity.flaws)

    def check(holds: bool, told: str) -> None:
        (kept if holds else missed).append(told)

    if contract.max_drop is not None and of_float is not None:
        drop = of_float - value
        told = f"{contract.metric} {of_float:.4f} to {value:.4f}: drop {drop:.4f}, at most {contract.max_drop:g}"
        check(drop <= contract.max_drop + SLACK, told)
    if contract.min is not None:
        check(
            value >= contract.min - SLACK,
            f"{contract.metric} {value:.4f}, at least {contract.min:g}",
        )
    verdict, reason = judge_speed_and_size(contract, speedup=speedup, size_ratio=size_ratio)
    if reason:
        (kept if verdict == "met" else missed).append(reason)
    return ("not_met", "; ".join(missed)) if missed else ("met", "; ".join(kept))


def judge_speed_and_size(
    contract: Contract, *, speedup: float | None = None, size_ratio: float | None = None
) -> tuple[str, str]:
    """("met" or "not_met", the reason in one line) of speed and size alone, where they are given.

    speedup     float latency / quantized latency
    size_ratio  quantized size / float size
    """
    kept: list[str] = []
    missed: list[str] = []
    if contract.min_speedup is not None and speedup is not None:
        reason = f"speedup {speedup:.2f}, at least {contract.min_speedup:g}"
        (kept if speedup >= contract.min_speedup else missed).append(reason)
    if contract.max_size_ratio is not None and size_ratio is not None:
        reason = f"size {size_ratio:.3f}, at most {contract.max_size_ratio:g}"
        (kept if size_ratio <= contract.max_size_ratio else missed).append(reason)
    return ("not_met", "; ".join(missed)) if missed else ("met", "; ".join(kept))


def load_metric(metric: str) -> CustomMetric:
    """The function `module:function`, its module found as `python -m` would find it.

    It is called as function(outputs, labels) with {output name: array over all samples} (a list with one array
    per feed where their shapes differ) and the labels or None; it returns a number, more is better.

    Raises: RequestError if there is no such function.
    """
    module, _, name = metric.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise RequestError(
            f"cannot be imported: {error}", metric, "module:function, as in accuracy:word_error"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise RequestError(
            f"is {type(function).__name__}", metric, "Name a function(outputs, labels) -> float"
        )
    return function  # type: ignore[no-any-return]


class _Tally:
    """Sums over the samples of one output."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.want2 = self.got2 = self.dot = self.noise = self.max_error = 0.0
        self.lo, self.hi = math.inf, -math.inf
        self.bad, self.rows, self.classes = 0, 0, 0
        self.mismatch, self.is_float, self.labelled = "", False, True
        # threshold (None: argmax or integers) -> counts as in NO_DECISIONS
        self.decided: dict[float | None, np.ndarray] = {}

    def update(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None) -> None:
        if got.shape != want.shape:
            self.mismatch = f"has shape {got.shape} where float has {want.shape}"
            got = np.full(want.shape, np.nan if want.dtype.kind == "f" else -1)
        if want.dtype.kind == "f":
            self.is_float = True
            self._add_errors(want, got)
        self._add_decisions(want, got, labels)

    def _add_errors(self, want: np.ndarray, got: np.ndarray) -> None:
        with np.errstate(invalid="ignore"):
            known = np.abs(want) < MASK
        w, g = want[known].astype(np.float64), got[known].astype(np.float64)
        self.lo, self.hi = (
            min(self.lo, w.min(initial=math.inf)),
            max(self.hi, w.max(initial=-math.inf)),
        )
        usable = np.isfinite(g)
        self.bad += g.size - int(usable.sum())
        w, g = w[usable], g[usable]
        self.want2 += float(w @ w)
        self.got2 += float(g @ g)
        self.dot += float(w @ g)
        error = g - w
        self.noise += float(error @ error)
        self.max_error = max(self.max_error, float(np.abs(error).max(initial=0.0)))

    def _add_decisions(self, want: np.ndarray, got: np.ndarray, labels: np.ndarray | None) -> None:
        axis = _class_axis(want)
        for threshold in [None] if axis is not None or want.dtype.kind != "f" else [0.5, 0.0]:
            theirs, ours = (np.atleast_1d(_decide(x, axis, threshold)) for x in (want, got))
            counts = self.decided.setdefault(threshold, NO_DECISIONS.copy())
            counts[:2] += theirs.size, int((theirs == ours).sum())
            truth = _aligned(labels, self.rows, theirs.shape) if self.labelled else None
            if truth is None or theirs.dtype.kind not in "iub":
                self.labelled = False
            else:
                right, right_float = (
                    (ours == truth) & (truth >= 0),
                    (theirs == truth) & (truth >= 0),
                )
                both = right & right_float
                counts[2:] += (truth >= 0).sum(), right.sum(), right_float.sum(), both.sum()
        self.classes = want.shape[axis] if axis is not None else 2 if want.dtype.kind == "f" else 0
        self.rows += len(theirs)

    def counts(self) -> np.ndarray:
        """As NO_DECISIONS, at the threshold that suits what float gave."""
        unused = 0.0 if self.lo >= 0 and self.hi <= 1 else 0.5
        return sum(
            (c for threshold, c in self.decided.items() if threshold != unused), NO_DECISIONS
        )

    def result(self) -> OutputFidelity:
        decisions = self.counts()
        flaw = self.mismatch or (
            f"holds {self.bad} values that are NaN or infinite" if self.bad else ""
        )
        agreement = float(decisions[1] / decisions[0]) if decisions[0] else None
        if not self.is_float:
            return OutputFidelity(self.name, None, None, None, agreement, flaw)
        if flaw:
            return OutputFidelity(self.name, -1.0, -SQNR_CAP, math.inf, agreement, flaw)
        sqnr_db = (
            10 * math.log10(max(self.want2, 1e-30) / max(self.noise, 1e-30))
            if self.noise
            else SQNR_CAP
        )
        norms = math.sqrt(self.want2) * math.sqrt(self.got2)
        cosine = self.dot / norms if norms else float(self.want2 == self.got2)
        sqnr_db = max(-SQNR_CAP, min(SQNR_CAP, sqnr_db))
        return OutputFidelity(
            self.name, max(-1.0, min(1.0, cosine)), sqnr_db, self.max_error, agreement
        )


def _measure(
    metric: str,
    names: Sequence[str],
    reference: list[Outputs],
    outputs: list[Outputs],
    labels: np.ndarray | None,
) -> dict[str, Any]:
    function = load_metric(metric)
    value, of_float = (
        _call(function, metric, _by_output(names, o), labels) for o in (outputs, reference)
    )
    return {"metric": value, "metric_float": of_float}


def _call(
    function: CustomMetric, metric: str, outputs: dict[str, Any], labels: np.ndarray | None
) -> float:
    try:
        value = float(function(outputs, labels))
    except Exception as error:  # the user's code may raise anything
        shapes = ", ".join(
            f"{n} {getattr(a, 'shape', 'of several shapes')}" for n, a in outputs.items()
        )
        raise DataError(
            f"failed on {shapes}: {type(error).__name__}: {error}", metric, "Repair the metric"
        ) from error
    if not math.isfinite(value):
        raise DataError(f"returned {value}", metric, "A metric is a finite number")
    return value


def _by_output(names: Sequence[str], feeds: list[Outputs]) -> dict[str, Any]:
    joined = {}
    for i, name in enumerate(names):
        arrays = [np.atleast_1d(outputs[i]) for outputs in feeds]
        same = len({a.shape[1:] for a in arrays}) == 1
        joined[name] = np.concatenate(arrays) if same else arrays
    return joined


def _blocks(
    reference: Iterable[Outputs], outputs: Iterable[Outputs]
) -> Iterator[tuple[Outputs, Outputs]]:
    """Both models' outputs, feeds of the same shapes joined: calls of numpy cost more than small sums."""
    held: list[tuple[Outputs, Outputs]] = []
    key, size = None, 0
    for pair in zip(reference, outputs, strict=True):
        shapes = [[a.shape for a in side] for side in pair]
        if held and (shapes != key or size >= BLOCK_ELEMENTS):
            yield _joined(held)
            held, size = [], 0
        held.append(pair)
        key, size = shapes, size + sum(a.size for a in pair[0])
    if held:
        yield _joined(held)


def _joined(held: list[tuple[Outputs, Outputs]]) -> tuple[Outputs, Outputs]:
    """One pair, each output joined along its first axis."""
    wanted, got = (
        [np.concatenate([np.atleast_1d(x) for x in output]) for output in _turned(s)]
        for s in _turned(held)
    )
    return wanted, got


def _turned(rows: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    return zip(*rows, strict=True)


def _class_axis(x: np.ndarray) -> int | None:
    """The axis whose largest value is the decision, None where each element decides for itself."""
    axis = 1 if x.ndim >= 4 else x.ndim - 1
    return axis if x.dtype.kind == "f" and x.ndim >= 2 and x.shape[axis] > 1 else None


def _decide(x: np.ndarray, axis: int | None, threshold: float | None) -> np.ndarray:
    """Class indices, -1 where NaN leaves no decision."""
    if axis is not None:
        return np.where(np.isnan(x).any(axis), -1, x.argmax(axis))
    if threshold is None:
        return x
    if x.ndim >= 2:  # a class axis of size 1
        x = x.squeeze(1 if x.ndim >= 4 else x.ndim - 1)
    return np.where(np.isnan(x), -1, x > threshold)


def _aligned(labels: np.ndarray | None, start: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """The labels of `shape[0]` rows from `start` on in the shape of the decisions, None if they do not fit."""
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


def _judged(
    tallies: Sequence[_Tally], labels: np.ndarray | None, *, required: bool
) -> _Tally | None:
    """The first output whose decisions the labels fit."""
    if labels is None or labels.dtype.kind not in "iub":
        return None
    fitting = [t for t in tallies if t.labelled and t.rows == len(labels)]
    if not fitting and required:
        rows = ", ".join(f"{t.name} {t.rows} rows" for t in tallies)
        hint = f"Decisions are (N,) or (N, T), here {rows}; for anything else give a metric module:function"
        raise DataError(f"labels of shape {labels.shape} fit no output", "labels", hint)
    if fitting and not fitting[0].counts()[2]:
        raise DataError(
            "all labels are below zero, which means ignored", "labels", "Class indices from 0 on"
        )
    return fitting[0] if fitting else None


def _top1(tally: _Tally, labels: np.ndarray | None) -> dict[str, Any]:
    _, _, n, right, right_float, both = map(int, tally.counts())
    classes = tally.classes or len(np.unique(labels[labels >= 0]) if labels is not None else ())
    return {
        "top1": right / n,
        "top1_float": right_float / n,
        "flips_bad": right_float - both,
        "flips_good": right - both,
        "note": _chance_note(right_float / n, classes, n),
    }


def _chance_note(top1_float: float, classes: int, n: int) -> str:
    """Said where guessing does as well: within three standard deviations of it, or hardly above."""
    chance = 1 / max(classes, 1)
    if classes < 2 or top1_float > chance + max(
        3 * math.sqrt(chance * (1 - chance) / n), min(chance / 2, 0.1)
    ):
        return ""
    return f"float top1 {top1_float:.3f} is what guessing among {classes} classes gives: check labels and preprocessing"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
