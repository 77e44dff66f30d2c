"""How close the outputs of a quantized model are to those of its float original, and how right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from quant_core.errors import DataError, ModelError
from quant_core.evaluate.custom_metric import measure_custom_metric
from quant_core.evaluate.decisions import Decisions
from quant_core.evaluate.output_tally import BLOCK_ELEMENTS, OutputTally
from quant_core.evaluate.outputs import Outputs
from quant_core.metrics import Fidelity
from quant_core.model.containers import numbers_of
from quant_core.text import counted


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
    integer output is its own decision. Of sequences and maps the numbers are compared.

    Raises: DataError if there is nothing to compare, if the labels fit no output, or if the user's
    function fails; ModelError if the numbers of outputs differ.
    """
    if metric is not None:
        reference, outputs = list(reference), list(outputs)
    tallies = [OutputTally(name) for name in names]
    samples = _add_all(tallies, reference, outputs, labels)
    labelled = _labelled_output(tallies, labels, required=metric is None)
    deciding = [labelled] if labelled else [t for t in tallies if t.rows == tallies[0].rows]
    decisions = sum((tally.decisions() for tally in deciding), Decisions())
    per_output = tuple(tally.result() for tally in tallies)
    errors = [o.max_abs_error for o in per_output if o.max_abs_error is not None]
    figures: dict[str, Any] = {}
    if labelled:
        figures |= _top1(labelled, labels)
    elif labels is not None and metric is None:
        figures["note"] = f"labels are {labels.dtype}, no whole numbers: nothing was held to them"
    if metric is not None:
        figures["metric"] = measure_custom_metric(metric, names, list(outputs), labels)
        figures["metric_float"] = measure_custom_metric(metric, names, list(reference), labels)
    return Fidelity(
        per_output=per_output,
        samples=samples,
        cosine=_mean([output.cosine for output in per_output]),
        sqnr_db=_mean([output.sqnr_db for output in per_output]),
        max_abs_error=max(errors, default=None),
        agreement=decisions.agreement,
        **figures,
    )


def _add_all(
    tallies: Sequence[OutputTally],
    reference: Iterable[Outputs],
    outputs: Iterable[Outputs],
    labels: np.ndarray | None,
) -> int:
    """Add all outputs of both models to the tallies; returns the number of samples."""
    samples = None
    for float_block, quantized_block, feeds in _blocks(reference, outputs):
        if not len(tallies) == len(float_block) == len(quantized_block):
            found = counted(len(quantized_block), "output")
            problem = f"gives {found}, float gives {len(float_block)}"
            raise ModelError(problem, hint="Is it the same model?")
        samples = (samples or 0) + _rows(float_block)
        for tally, want, got in zip(tallies, float_block, quantized_block, strict=True):
            tally.add(want, got, labels, feeds)
    if samples is None:
        raise DataError("nothing to compare", hint="At least one sample")
    return samples


def _blocks(
    reference: Iterable[Outputs], outputs: Iterable[Outputs]
) -> Iterator[tuple[Outputs, Outputs, int]]:
    """Both models' outputs, with feeds of the same shapes joined, and how many these are.

    One call of numpy costs more than a small sum, so that small feeds are worth joining.
    """
    held: list[tuple[Outputs, Outputs]] = []
    held_shapes, held_elements = None, 0
    for pair in zip(_in_numbers(reference), _in_numbers(outputs), strict=True):
        shapes = [[array.shape for array in side] for side in pair]
        if held and (shapes != held_shapes or held_elements >= BLOCK_ELEMENTS):
            yield *_joined(held), len(held)
            held, held_elements = [], 0
        held.append(pair)
        held_shapes = shapes
        held_elements += sum(array.size for array in pair[0])
    if held:
        yield *_joined(held), len(held)


def _in_numbers(outputs: Iterable[Outputs]) -> Iterator[Outputs]:
    """The outputs feed by feed, with sequences and maps as arrays of their numbers."""
    return ([numbers_of(x) for x in feed] for feed in outputs)


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


def _labelled_output(
    tallies: Sequence[OutputTally], labels: np.ndarray | None, *, required: bool
) -> OutputTally | None:
    """The first output whose decisions the labels fit, None without labels.

    Raises: DataError if the labels fit no output and `required`, or if all labels are negative.
    """
    if labels is None or labels.dtype.kind not in "iub":
        return None
    fitting = [t for t in tallies if t.labels_fit and t.rows == len(labels)]
    if not fitting and required:
        rows = ", ".join(f"output {tally.name} has {tally.rows} rows" for tally in tallies)
        hint = (
            f"Decisions are (N,) or (N, T), and {rows}; for anything else give a metric "
            "module:function"
        )
        raise DataError(f"labels of shape {labels.shape} fit no output", "labels", hint)
    if fitting and not fitting[0].decisions().labelled:
        problem = "all labels are below zero, which means ignored"
        raise DataError(problem, "labels", "Class indices from 0 on")
    return fitting[0] if fitting else None


def _top1(tally: OutputTally, labels: np.ndarray | None) -> dict[str, Any]:
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
