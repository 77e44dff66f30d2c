"""What Python callers use to judge models that are there: how right, how fast, by which kernels."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from quant_core.answers import Compared, ExplainedKernel, Explanation, Validation
from quant_core.api import QUIET, plan_model
from quant_core.config import Contract, QuantConfig
from quant_core.data.for_model import as_spec, samples_for
from quant_core.data.inputs import input_specs, sizes_of
from quant_core.data.samples import Samples
from quant_core.data.spec import RANDOM, SampleSource, SampleSpec
from quant_core.deadline import Progress, silent
from quant_core.errors import DataError, ModelError, RequestError
from quant_core.evaluate.contract import Ruling, Verdict, judge
from quant_core.evaluate.custom_metric import code_allowed
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.float_reasons import has_integers
from quant_core.evaluate.kernels import profile_kernels
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.evaluate.outputs import Outputs, StoredOutputs, run_each
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.evaluate.sensitivity import Sensitivity
from quant_core.evaluate.timing import Timing, measure, measure_all
from quant_core.metrics import Fidelity, custom_metric_in
from quant_core.model import files, graph
from quant_core.model.choices import CHOOSES, chosen_from
from quant_core.model.normalize import load_normalized, normalize
from quant_core.model.prepare import STAYS_FLOAT, prepare
from quant_core.model.providers import find_provider
from quant_core.model.session import open_session, output_names, run
from quant_core.optimize.applied import REWRITES, from_text
from quant_core.optimize.run import follow
from quant_core.plan.types import NodePlan
from quant_core.search.checks import check_same_interface
from quant_core.search.policy import POLICY
from quant_core.search.prepared import first_feeds
from quant_core.text import joined


@QUIET
def validate_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    metric: str | None = None,
    contract: Contract | None = None,
    detailed: bool = False,
    allow_code: str | Path | None = None,
    provider: str = "cpu",
    progress: Progress = silent,
) -> Validation:
    """How near a quantized model comes to its float original, whoever made it.

    samples     with labels as a `SampleSpec`
    metric      "module:function", the user's own, which is measured beside the others
    detailed    whether the sensitivity of each node is measured too
    allow_code  the folder from which a metric "module:function" is imported; None: none runs
    provider    execution provider of onnxruntime that runs both models, such as cuda; the CPU where
                that one does not work, and the note of the fidelity says so
    progress    is called with what is being done, about once a second

    Raises: QuantError.
    """
    custom = custom_metric_in(metric, contract.metric if contract is not None else None)
    used = find_provider(provider)
    first = open_session(Path(original), provider=used.name)
    second = open_session(Path(quantized), provider=used.name)
    feeds = samples_for(original, samples, first, second).keeping()
    check_same_interface(first, second, quantized)
    fidelity, ruling = _judged(first, second, feeds, custom, contract, allow_code, progress)
    made = files.load(quantized)
    before_choices = _before_choices(Path(original), made, feeds)
    sensitivities, not_measured = [], ""
    if detailed:
        progress("measuring what each node costs")
        sizes = sizes_of(input_specs(first, second))
        try:
            sensitivities = _sensitivities(Path(original), made, feeds, sizes)
        except ModelError as error:  # the outputs are compared all the same
            not_measured = f"what nodes cost is not known: {error.problem}"
    notes = [fidelity.note, before_choices, used.note, not_measured]
    fidelity = replace(fidelity, note=joined(notes))
    normalize(made)
    return Validation(
        fidelity,
        ruling.verdict,
        ruling.reason,
        [asdict(node) for node in saturating_nodes(made)],
        [asdict(sensitivity) for sensitivity in sensitivities],
    )


def _judged(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    feeds: Samples,
    custom: str | None,
    contract: Contract | None,
    allow_code: str | Path | None,
    progress: Progress,
) -> tuple[Fidelity, Ruling]:
    """The fidelity of the second model to the first, and the ruling on the contract: it is missed
    where its own metric fails.
    """
    names = output_names(first)

    def fidelity_by(metric: str | None) -> Fidelity:
        expected, found = run_each(first, feeds), run_each(second, feeds)
        with code_allowed(allow_code):
            counted = _counted(found, len(feeds), progress)
            return compare(expected, counted, names, feeds.labels, metric)

    try:
        fidelity = fidelity_by(custom)
        return fidelity, judge(fidelity, contract)
    except DataError as failure:
        if custom is None or contract is None:
            raise
        return fidelity_by(None), Ruling(Verdict.NOT_MET, str(failure))


def _before_choices(original: Path, quantized: ir.Model, feeds: Samples) -> str:
    """How near the results are that a model chooses among at its end, which says more of it than
    what it chooses; "" if it does not end so, or the quantized one has other names for them.
    """
    if not any(graph.nodes_of(quantized, *CHOOSES)):
        return ""
    model = load_normalized(original)
    names = chosen_from(model)
    if not names or not set(names) <= {
        str(v.name) for node in quantized.graph for v in node.outputs
    }:
        return ""
    few = feeds.subsample(POLICY.judging_samples)

    def results(of: ir.Model) -> Iterator[Outputs]:
        inner = set(names) - {str(value.name) for value in of.graph.outputs}
        session = open_session(of, outputs=sorted(inner))
        return (run(session, feed, outputs=names) for feed in few)

    worst_db = compare(results(model), results(quantized), names).measured_db
    if worst_db is None:
        return ""
    return (
        f"it ends in a choice among results, which have {worst_db:.1f} dB around their mean or "
        "more: of close ones, the smallest noise changes which come first"
    )


def _sensitivities(
    original: Path, quantized: ir.Model, feeds: Samples, sizes: Mapping[str, int]
) -> list[Sensitivity]:
    """The sensitivity of each node, on a few of the feeds.

    sizes  INPUT:AXIS -> what the quantized model fixes it to
    """
    rewrites = from_text(quantized.metadata_props.get(REWRITES, ""))
    stays_float = STAYS_FLOAT in quantized.metadata_props
    prepared = prepare(original, first_feeds(feeds), sizes=sizes, stays_float=stays_float)
    few = feeds.subsample(POLICY.sensitivity_samples)
    return measure_sensitivity(follow(prepared, rewrites), quantized, few)


def benchmark_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 3.0,
) -> Timing:
    """How fast a quantized model is beside its original: both run in turns on the same feed.

    threads  of each model
    batch    so many samples are one feed
    seconds  for both together

    Raises: QuantError.
    """
    _check_limits(threads, seconds)
    first = open_session(Path(original), threads=threads)
    second = open_session(Path(quantized), threads=threads)
    feeds = samples_for(
        original, replace(as_spec(samples), labels=None, count=batch), first, second
    )
    check_same_interface(first, second, quantized)
    return measure(first, second, feeds.batch(batch), seconds=seconds)


@QUIET
def explain_model(
    path: str | Path,
    config: QuantConfig | None = None,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    threads: int = 1,
    seconds: float = 1.0,
) -> Explanation:
    """Which kernels run a model on this CPU, whoever made it, and what a plan would change.

    config   of that plan; a model that is quantized already has none
    seconds  how long kernels are timed

    Raises: QuantError.
    """
    _check_limits(threads, seconds)
    sizes = config.fix_shape if config is not None else None
    feeds, model = samples_for(path, samples, sizes=sizes), load_normalized(path)
    kernels = profile_kernels(
        Path(path), feeds[0], threads=threads, seconds=seconds, normalized=model
    )
    unsafe = {node.node: node.pairs for node in saturating_nodes(model)}
    planned: dict[str, NodePlan] = {}
    is_quantized = has_integers(model)
    if not is_quantized:
        plan = plan_model(path, config, feeds)
        planned = {node.node: node for node in plan.nodes}
    rows = []
    for kernel in kernels:
        advice = [_advice(planned[name]) for name in kernel.covers if name in planned]
        pairs = sum(unsafe.get(name, 0) for name in kernel.covers)
        rows.append(ExplainedKernel(kernel, pairs, next(filter(None, advice), "")))
    return Explanation(str(path), is_quantized, tuple(rows))


def _check_limits(threads: int, seconds: float) -> None:
    """Raises: RequestError if nothing can be timed with so many threads, or for so long."""
    if threads < 1:
        raise RequestError(f"is {threads}", "threads", "1 or more")
    if not 0 <= seconds < math.inf:
        raise RequestError(f"is {seconds}", "seconds", "0 or more, and not without end")


def _advice(planned: NodePlan) -> str:
    """What a plan does with a node that has a weight; "" for the others."""
    if planned.storage is None:
        return ""
    compute = "compute in float" if not planned.compute.is_integer else f"be {planned.compute}"
    reason = f" ({planned.reason})" if planned.reason else ""
    return f"{compute}, weight in {planned.storage}{reason}"


@QUIET
def compare_models(
    original: str | Path,
    others: Sequence[str | Path],
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    metric: str | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    allow_code: str | Path | None = None,
    progress: Progress = silent,
) -> list[Compared]:
    """Several files of one model side by side, whoever made them, against one float reference.

    seconds  for the timing of all together, in turns

    The other parameters are those of `validate_model`. Raises: QuantError.
    """
    _check_limits(threads, seconds)
    custom = custom_metric_in(metric)
    reference = open_session(Path(original), threads=threads)
    sessions = [open_session(Path(other), threads=threads) for other in others]
    feeds = samples_for(original, samples, reference, *sessions)
    for session, other in zip(sessions, others, strict=True):
        check_same_interface(reference, session, other)
    names = output_names(reference)
    progress("running the original")
    expected = StoredOutputs(_counted(run_each(reference, feeds), len(feeds), progress))
    progress("timing all files in turn", seconds)
    timings = measure_all(reference, sessions, feeds[0], seconds=seconds)
    rows = []
    for other, session, timing in zip(others, sessions, timings, strict=True):
        progress(f"comparing {Path(other).name} with the original")
        found = _counted(run_each(session, feeds), len(feeds), progress)
        with code_allowed(allow_code):
            fidelity = compare(expected, found, names, feeds.labels, custom)
        rows.append(Compared(str(other), files.bytes_on_disk(Path(other)), fidelity, timing))
    return rows


def _counted(outputs: Iterable[Outputs], total: int, progress: Progress) -> Iterator[Outputs]:
    """The outputs, while `progress` is called about once a second with how long the others take."""
    start = last = time.monotonic()
    for done, output in enumerate(outputs, 1):
        now = time.monotonic()
        if now - last >= 1.0:
            last, left = now, (now - start) / done * (total - done)
            progress(f"{done} of {total} samples are done", left)
        yield output
