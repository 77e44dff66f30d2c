"""What Python callers use: one function per thing that a person does with a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics, observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.samples import Samples, input_specs, open_samples
from quant_core.data.spec import RANDOM, SampleLabels, SampleShape, SampleSource, SampleSpec
from quant_core.errors import DataError, ModelError, RequestError
from quant_core.evaluate.contract import Verdict, judge
from quant_core.evaluate.fidelity import compare, run_each
from quant_core.evaluate.layer_report import layer_reports
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.evaluate.timing import Timing, measure
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.metrics import Fidelity
from quant_core.model import files, graph
from quant_core.model.info import model_info
from quant_core.model.prepare import OPSET_INT4, prepare, raise_opset
from quant_core.model.session import open_session
from quant_core.model.write import write_model
from quant_core.plan.make import make_plan
from quant_core.plan.operators import RULES
from quant_core.plan.targets import find_target, host_target_name
from quant_core.plan.types import Compute, NodeChoice, QuantPlan, Storage
from quant_core.search.calibrated import Material
from quant_core.search.candidate import AS_FAST, Bench
from quant_core.search.mixed_precision import restored
from quant_core.search.search import Found, search

DAMAGE_FEEDS = 8  # on which the cost of each node is measured
PREPARE_SAMPLES = 2  # on which folding is checked
FEW = 64  # samples tell two candidates apart, where none are given to judge a contract by
HELD_OUT = 4  # one in so many samples judges what 4 bits make of the others, where nothing else is there to judge by


@dataclass(frozen=True, slots=True)
class QuantResult:
    """What was written, and why it is as it is. Sizes in bytes; `layers` and `trace` hold one row each.

    note  what makes the result doubtful, "" if nothing
    """

    output: str
    size_bytes: int
    float_size_bytes: int
    target: str
    saturation_safe: bool
    verdict: str
    reason: str
    note: str
    plan: QuantPlan
    layers: list[dict[str, Any]]
    trace: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | {
            "plan": self.plan.to_dict(),
            "size_ratio": self.size_bytes / self.float_size_bytes,
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """A quantized model against its float original, and against its contract if it has one.

    verdict     met, not_met or none
    saturation  the nodes that give other results on x86 without VNNI
    damage      the sensitivity of each node; only if `detailed`
    """

    fidelity: Fidelity
    verdict: str
    reason: str
    saturation: list[dict[str, Any]] = field(default_factory=list)
    damage: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"fidelity": self.fidelity.to_dict(), "verdict": self.verdict, "reason": self.reason,
                "saturation": self.saturation, "damage": self.damage}  # fmt: skip


def quantize(
    input_path: str | Path,
    output_path: str | Path,
    bits: int = 8,
    per_channel: bool = True,
    **options: Any,
) -> QuantResult:
    """A smaller model without calibration: weights in `bits`, activations at run time where that is faster.

    options  fields of QuantConfig. Raises: QuantError.
    """
    config = QuantConfig.from_dict({"bits": bits, "per_channel": per_channel, **options})
    return quantize_model(input_path, output_path, config)


def quantize_with_calibration(
    input_path: str | Path,
    output_path: str | Path,
    calibration_data: SampleSource | None = None,
    bits: int = 8,
    per_channel: bool = True,
    method: str = "auto",
    num_samples: int = 100,
    sample_shape: SampleShape | None = None,
    **options: Any,
) -> QuantResult:
    """A model that computes in integers, with ranges measured on `calibration_data` (None: random samples).

    sample_shape  of random samples, where the model leaves sizes open; options: fields of QuantConfig.
    Raises: QuantError.
    """
    config = QuantConfig.from_dict(
        {"bits": bits, "per_channel": per_channel, "method": method, **options}
    )
    source = RANDOM if calibration_data is None else calibration_data
    return quantize_model(
        input_path,
        output_path,
        config,
        calibration=source,
        num_samples=num_samples,
        sample_shape=sample_shape,
    )


def plan_model(
    path: str | Path,
    config: QuantConfig | None = None,
    samples: SampleSource | None = None,
    *,
    num_samples: int | None = None,
    sample_shape: SampleShape | None = None,
) -> QuantPlan:
    """What would be done to a model, without doing it. Raises: QuantError."""
    config = config or QuantConfig()
    feeds = None
    if samples is not None:
        feeds = _open(path, SampleSpec(samples, count=num_samples, shape=sample_shape))
    return first_plan(prepare(path, some(feeds)), config, measured=samples is not None)


def quantize_model(
    path: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: SampleSource | None = None,
    labels: SampleLabels | None = None,
    num_samples: int | None = None,
    sample_shape: SampleShape | None = None,
    contract: Contract | None = None,
    evaluation: SampleSource | None = None,
    plan: QuantPlan | None = None,
    costs: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> QuantResult:
    """The best model that `config` allows, written to `output` at once or not at all.

    calibration  samples that ranges are measured on; without any, nothing computes in static integers
    evaluation   samples that candidates are judged by, with `labels`: all of them if there is a contract or labels;
                 the calibration samples if there are none
    plan         do exactly this (a dry run's plan, or the one that a result holds) instead of searching
    costs        file of what was timed (costs.py), read and added to: with all in it, the same bytes again

    Raises: QuantError.
    """
    config = plan.config if plan is not None else config or QuantConfig()
    output = check_output(path, output)
    feeds = None
    if calibration is not None:
        own_labels = labels if evaluation is None else None
        spec = SampleSpec(calibration, own_labels, num_samples, sample_shape)
        feeds = _open(path, spec)
    judged = feeds
    if evaluation is not None:
        judged = _open(path, SampleSpec(evaluation, labels, shape=sample_shape))
    model = prepare(path, some(feeds))
    if plan is not None:
        _check_plan(model, plan, feeds)
    wide = plan or first_plan(model, config, measured=feeds is not None)
    stats = None
    if feeds is not None:
        progress(f"calibrating on {len(feeds)} samples")
        stats = observe(model, wide, feeds)
    return finish(
        model, path, output, wide, stats, feeds, judged, contract,
        exact=plan is not None, costs=TimingCache(costs), progress=progress,
    )  # fmt: skip


def finish(
    model: ir.Model,
    original: str | Path,
    output: Path,
    plan: QuantPlan,
    stats: Statistics | None,
    feeds: Samples | None,
    judged: Samples | None,
    contract: Contract | None,
    *,
    exact: bool = False,
    detailed: bool = True,
    costs: TimingCache | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> QuantResult:
    """Search, write, tell: what is left of quantizing once ranges are measured.

    exact     the plan is not varied
    detailed  layers tell what damage each node does
    costs     what was timed before, and what will be

    Weights in 4 bits are fitted to the samples so closely that these cannot judge them: without others, a contract is
    judged by a part held out, and what is written is then fitted to all.
    """
    asked, (plan, why) = plan, _storable(model, plan, contract)
    stand_in = (
        contract is not None
        and feeds is not None
        and judged is not None
        and judged.same_feeds(feeds)
    )
    whole, apart = feeds, None
    if (
        stand_in
        and feeds is not None
        and not exact
        and len(feeds) >= 2 * HELD_OUT
        and _fits_samples(plan)
    ):
        feeds, judged = apart = feeds.split_holdout(HELD_OUT)
    if stats is not None:
        progress("measuring how inputs vary together")
    material = Material(model, feeds, stats).fitted(plan)
    if contract is not None and judged is None:
        raise DataError(
            "a contract needs samples to judge by",
            str(original),
            "Give evaluation or calibration data",
        )
    float_size = model_info(original).size_bytes
    metric = contract.metric if contract is not None and ":" in contract.metric else None
    is_host = (plan.target == "arm64") == (host_target_name() == "arm64")
    bench = None
    if judged is not None:
        if judged.labels is None and (contract is None or stand_in):
            judged = judged.subsample(FEW)
        bench = Bench(
            Path(original),
            judged,
            float_size,
            metric,
            costs=costs or TimingCache(),
            is_host=is_host,
        )
    if exact and plan.equalized_db and (evened := material.evened(plan)):
        material = evened
    found = search(material, plan, bench, contract, exact=exact, progress=progress)
    best, bench = (
        replace(found.best, plan=_explained(found.best.plan, asked, why)),
        None,
    )  # and its sessions go
    if apart is not None:
        progress("fitting all samples")
        material = replace(found.material, feeds=whole).fitted(best.plan)
        best = replace(best, quantized=material.build(best.plan, best.name).quantized)
        best = replace(best, quantized=material.settled(best) or best.quantized)
    model = found.material.model
    material, found = Material(model), replace(found, material=Material(model))  # statistics go too
    harm = (
        measure_sensitivity(model, best.model, judged.subsample(DAMAGE_FEEDS))
        if detailed and judged is not None
        else []
    )
    layers = [asdict(row) for row in layer_reports(best.plan, best.quantized, harm)]
    safe = all(row["saturation_safe"] for row in layers)
    # nothing of how it was found: a plan that is replayed makes the same bytes
    properties = {"target": best.plan.target, "saturation_safe": str(safe).lower()}
    best.model.metadata_props.update({f"quantmill.{k}": v for k, v in properties.items()})
    size = write_model(best.model, output)
    part = (
        f"the contract was judged by {len(judged)} samples held out of calibration"
        if apart and judged
        else ""
    )
    note = "; ".join(
        filter(None, [_note(found, stand_in and apart is None), part, *_idle_globs(model, plan)])
    )
    return QuantResult(str(output), size, float_size, best.plan.target, safe, found.verdict, found.reason, note,
                       best.plan, layers, found.trace)  # fmt: skip


def validate_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource = RANDOM,
    *,
    labels: SampleLabels | None = None,
    metric: str | None = None,
    contract: Contract | None = None,
    num_samples: int | None = None,
    sample_shape: SampleShape | None = None,
    detailed: bool = False,
) -> Validation:
    """How right a quantized model is, whoever made it. Raises: QuantError."""
    feeds = _open(original, SampleSpec(samples, labels, num_samples, sample_shape))
    own = next(
        (m for m in (metric, contract.metric if contract else None) if m is not None and ":" in m),
        None,
    )
    first, second = open_session(Path(original)), open_session(Path(quantized))
    _same_interface(first, second, quantized)
    names = [o.name for o in first.get_outputs()]
    try:
        fidelity = compare(
            run_each(first, feeds), run_each(second, feeds), names, feeds.labels, own
        )
        verdict, reason = Verdict.NONE, "no contract"
        if contract is not None:
            verdict, reason = judge(fidelity, contract)
    except DataError as failure:
        if own is None or contract is None:
            raise
        fidelity = compare(run_each(first, feeds), run_each(second, feeds), names, feeds.labels)
        verdict, reason = Verdict.NOT_MET, str(failure)
    few = feeds.subsample(DAMAGE_FEEDS)
    costs = []
    if detailed:
        costs = measure_sensitivity(prepare(original, some(feeds)), files.load(quantized), few)
    return Validation(
        fidelity,
        verdict,
        reason,
        [asdict(node) for node in saturating_nodes(Path(quantized))],
        [asdict(cost) for cost in costs],
    )


def benchmark_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource | None = None,
    *,
    threads: int = 1,
    seconds: float = 3.0,
    sample_shape: SampleShape | None = None,
) -> Timing:
    """How fast a quantized model is beside its original, in turns, on the first sample. Raises: QuantError."""
    source = RANDOM if samples is None else samples
    feeds = _open(original, SampleSpec(source, count=1, shape=sample_shape))
    first, second = (open_session(Path(p), threads=threads) for p in (original, quantized))
    _same_interface(first, second, quantized)
    return measure(first, second, feeds[0], seconds=seconds)


def first_plan(model: ir.Model, config: QuantConfig, *, measured: bool) -> QuantPlan:
    """The plan that calibration covers: in mode auto all that may turn out static, so that every variant is covered.

    Raises: RequestError if static is asked for without samples to measure ranges on.
    """
    if config.mode == "static" and not measured:
        raise RequestError(
            "is static, which needs calibration",
            "mode",
            "Give data, or mode dynamic or weight_only",
        )
    plan = make_plan(model, config, find_target(config.target))
    if config.mode == "auto" and not measured:
        wanted = {
            n.node: NodeChoice(Compute.DYNAMIC if RULES[n.op_type].dynamic else Compute.FLOAT)
            for n in plan.nodes
            if n.weights
        }
        return make_plan(model, config, find_target(config.target), wanted)
    return plan


def check_output(path: str | Path, output: str | Path) -> Path:
    """The output path, once it can be written. Raises: RequestError if it is the input, or cannot be written."""
    path, output = Path(path), Path(output)
    if output.exists() and path.exists() and output.samefile(path):
        raise RequestError(
            "the output is the input, which is never changed", str(output), "Choose another output"
        )
    if output.is_dir():
        raise RequestError("is a folder", str(output), "Name a file, such as model_int8.onnx")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"the folder cannot be made: {error.strerror}", str(output.parent), "Choose another"
        ) from error
    if not os.access(output.parent, os.W_OK):
        raise RequestError(
            "the folder cannot be written to",
            str(output.parent),
            "Choose another or change its rights",
        )
    return output


def _storable(model: ir.Model, plan: QuantPlan, contract: Contract | None) -> tuple[QuantPlan, str]:
    """The plan, and why 4 bits became 8: in 8 where the model cannot hold 4 and a contract is asked for.

    Raises: ModelError where exactly 4 bits are asked for.
    """
    four = plan.in_four_bits
    if four and graph.opset(model) < OPSET_INT4:
        try:
            raise_opset(model, OPSET_INT4)
        except ModelError as error:
            if contract is None:
                raise ModelError(
                    error.problem, four[0], f"{error.hint}, or ask for 8 bits, or a contract"
                ) from error
            return restored(model, plan, four, Storage.INT8), error.problem
    return plan, "4 bits break the contract"


def _explained(plan: QuantPlan, asked: QuantPlan, why: str) -> QuantPlan:
    """The plan with the reason at each node that was to be in 4 bits and is not."""
    four = set(asked.in_four_bits)
    lifted = {
        n.node for n in plan.nodes if n.node in four and n.storage not in (Storage.INT4, None)
    }
    reasons = {
        n.node: "; ".join(filter(None, (n.reason, f"{n.storage}: {why}"))) for n in plan.nodes
    }
    return replace(
        plan,
        nodes=tuple(
            replace(n, reason=reasons[n.node]) if n.node in lifted else n for n in plan.nodes
        ),
    )


def _fits_samples(plan: QuantPlan) -> bool:
    """Whether the samples that weights are fitted to could not judge them."""
    return bool(plan.in_four_bits) and plan.config.weight_method in ("auto", "gptq")


def _note(found: Found, stand_in: bool) -> str:
    notes = [found.best.fidelity.note] if found.best.fidelity is not None else []
    if stand_in:
        notes.append("the contract was judged by the samples that ranges were measured on")
    if (found.best.speedup or 1.0) < AS_FAST:
        why = (
            "nothing faster was found"
            if found.best.plan.config.mode == "auto"
            else "mode auto may find faster"
        )
        notes.append(f"{found.best.speedup:.2f}x of float's speed: {why}")
    return "; ".join(filter(None, notes))


def _idle_globs(model: ir.Model, plan: QuantPlan) -> list[str]:
    """The globs of the config that name nothing in the model."""
    names = {
        name
        for g in graph.graphs_of(model)
        for n in g
        for name in (n.name, *(v.name for v in n.inputs if v))
    }
    globs = {"exclude": plan.config.exclude, "layer_bits": plan.config.layer_bits}
    return [
        f"{key} {glob} matches no node and no weight"
        for key, said in globs.items()
        for glob in said
        if not any(fnmatchcase(name or "", glob) for name in names)
    ]


def _check_plan(model: ir.Model, plan: QuantPlan, feeds: Samples | None) -> None:
    """Raises: RequestError if the plan names nodes or tensors that the model has not, or needs ranges of no samples."""
    nodes = [n for g in graph.graphs_of(model) for n in g]
    tensors = {v.name for v in model.graph.inputs} | {v.name for n in nodes for v in n.outputs}
    planned = {n.node for n in plan.nodes} - {n.name for n in nodes}
    unknown = sorted(planned | ({*plan.activations, *plan.means, *plan.outliers} - tensors))
    if unknown:
        raise RequestError(
            f"is of another model: this one has no {unknown[0]}", "plan", "Plan this model anew"
        )
    if plan.activations and feeds is None:
        raise RequestError(
            "has static nodes, which need calibration", "plan", "Give the data that they are to fit"
        )


def _open(model: str | Path, spec: SampleSpec) -> Samples:
    """The samples of `spec` for the model in that file."""
    return open_samples(spec, input_specs(Path(model)))


def some(feeds: Samples | None) -> Any:
    """The first few feeds, on which folding is checked."""
    return (feeds[i] for i in range(min(PREPARE_SAMPLES, len(feeds)))) if feeds is not None else ()


def _same_interface(first: Any, second: Any, where: str | Path) -> None:
    """Raises: ModelError unless both sessions take and give tensors of the same names."""
    for kind in ("inputs", "outputs"):
        a, b = ([v.name for v in getattr(s, f"get_{kind}")()] for s in (first, second))
        if a != b:
            raise ModelError(
                f"has {kind} {', '.join(b)}, its original {', '.join(a)}",
                str(where),
                "Not the same model",
            )
