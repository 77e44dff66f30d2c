"""What the commands of `quantmill` answer about one model, as JSON values with the view that draws
them.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.command import Answer
from flows.cli.options import AccuracyOptions, changed_options, flag_of
from flows.console import model_views, result_views
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.deadline import Progress
from quant_core.errors import DataError, ModelError, RequestError, reason_of

if TYPE_CHECKING:
    from flows.runtime.javascript import Runtime as JavaScript
    from quant_core.plan.types import QuantPlan

WEB_SECONDS = 3.0  # of timing: a wasm engine first compiles what is hot
EXPORT_SAMPLES = 8  # on which an export is compared with what it was made of


def command_line(*words: str | Path) -> str:
    """A command line of quantmill, as it is typed."""
    return shlex.join(["quantmill", *map(str, words)])


def plan_answer(model: Path, config: QuantConfig, calibration: SampleSpec | None) -> Answer:
    """The plan of a model, which is not followed."""
    from quant_core import api

    plan = api.plan_model(model, config, calibration)
    return Answer(plan.to_dict(), model_views.plan_view)


def first_accuracy_option(accuracy: AccuracyOptions) -> str | None:
    """The first of `--metric`, `--max-drop` and `--min` that was typed; None if none was."""
    contract = accuracy.contract
    typed = {
        "--metric": accuracy.metric,
        "--max-drop": contract and contract.max_drop,
        "--min": contract and contract.min,
    }
    return next((option for option, value in typed.items() if value is not None), None)


def quantize_answer(
    model: Path,
    output: Path | None,
    config: QuantConfig,
    calibration: SampleSpec | None,
    accuracy: AccuracyOptions,
    progress: Progress,
    costs: Path | None,
    plan_file: Path | None = None,
    pareto: bool = False,
) -> Answer:
    """Quantize a model and time it; compare it with the original if a metric, contract or labels
    were given.
    """
    from quant_core import api

    plan = _read_plan(plan_file) if plan_file else None
    bits = plan.config.bits if plan is not None else config.bits
    output = output or model.with_name(f"{model.stem}_int{bits}.onnx")
    result = api.quantize_model(
        model,
        output,
        config,
        calibration=calibration,
        contract=accuracy.contract,
        plan=plan,
        costs=costs,
        progress=progress,
        allow_code=accuracy.allow_code,
        whole_front=pareto,
    ).to_dict()
    result["shows_front"] = pareto
    result["timing"] = None
    time_both = _timing_of(result["target"])
    if time_both is not None:
        progress("timing both models in turn")
        try:
            result["timing"] = time_both(model, output, calibration or SampleSpec())
        except (DataError, ModelError):  # the model does not run on random samples
            if calibration is not None:
                raise
    if calibration and (accuracy.metric or accuracy.contract or calibration.labels):
        progress("comparing it with the original")
        result |= validation(model, output, calibration, accuracy, progress)
        if result["shortfall"]:
            result |= {"verdict": "not_met", "reason": result["shortfall"]}
    is_missed = result["verdict"] == "not_met"
    if calibration is None:
        following = ["quantize", str(model), "--data", "SAMPLES.npz"]
    else:
        data = ["--data", str(calibration.source), *(["--detailed"] if is_missed else [])]
        following = ["validate", str(model), str(output), *data]
    result["next"] = command_line(*following)
    return Answer(result, result_views.quantization_view, exit_code=int(is_missed))


def _timing_of(target: str) -> Callable[..., dict[str, Any]] | None:
    """What times a file for that target: onnxruntime here, or another runtime where installed."""
    from flows.runtime.javascript import find_package
    from quant_core.plan.targets import Runtime
    from quant_core.search.prepared import timed_in

    if (runtime := timed_in(target)) is not None:
        return timing if runtime is Runtime.ONNXRUNTIME else openvino_timing
    if target != "web" or shutil.which("node") is None:
        return None
    try:
        find_package("onnxruntime-web")
    except RequestError:
        return None
    return partial(javascript_timing, "wasm", threads=1, batch=1, seconds=WEB_SECONDS)


def for_export(export: str, config: QuantConfig, plan: Path | None) -> QuantConfig:
    """The config for the runtime of an export. Raises: RequestError if it is for another one, or
    the runtime is not installed.
    """
    from flows.runtime.openvino_ir import check_openvino

    check_openvino()
    if plan is not None or config.target == export:
        return config
    if config.target != "auto":
        hint = f"Leave it out, or write --target {export}"
        raise RequestError(f"is {config.target}, and --export {export}", "--target", hint)
    return replace(config, target=export)


def with_export(answer: Answer, original: Path, calibration: SampleSpec | None) -> Answer:
    """The answer, with OpenVINO's files beside the model, and what OpenVINO makes of them.

    The exit code is 1 if they are wrong, slow or not in integers there.
    """
    from flows.runtime.openvino_ir import export_ir
    from quant_core.data.for_model import samples_for

    result = dict(answer.data)
    output = Path(result["output"])
    spec = replace(calibration or SampleSpec(), labels=None, count=EXPORT_SAMPLES)
    samples = samples_for(original, spec, original, output)
    feeds = [samples[i] for i in range(len(samples))]
    found = export_ir(original, output, output.with_suffix(".xml"), feeds).to_dict()
    code = max(answer.exit_code, int(bool(found["note"])))
    return replace(answer, data=result | {"export": found}, exit_code=code)


def timing(
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 0.2,
) -> dict[str, Any]:
    """The latency of both models, and how much of the host others took meanwhile."""
    from quant_core import judging
    from quant_core.worker.host import OtherLoad

    load = OtherLoad(os.getpid())
    timed = judging.benchmark_model(
        original,
        quantized,
        samples,
        threads=threads,
        batch=batch,
        seconds=seconds,
    )
    return timed.to_dict() | load.until_now()


def openvino_timing(
    original: Path, quantized: Path, samples: SampleSpec, seconds: float = 0.2
) -> dict[str, Any]:
    """The same in OpenVINO, on one thread."""
    from quant_core.data.for_model import samples_for
    from quant_core.evaluate.in_openvino import race_in_openvino
    from quant_core.worker.host import OtherLoad

    few = replace(samples, labels=None, count=1)
    feed = samples_for(original, few, original, quantized)[0]
    load = OtherLoad(os.getpid())
    return race_in_openvino(original, quantized, feed, seconds).to_dict() | load.until_now()


def javascript_timing(
    runtime: JavaScript,
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    threads: int,
    batch: int,
    seconds: float,
) -> dict[str, Any]:
    """The same where JavaScript runs both, and how near the outputs of each there are to Python's.

    control                             speed of the float model over a copy of itself, or None
    float_equal_db, quantized_equal_db  SQNR of the worst output in dB
    """
    from flows.runtime.javascript import race
    from quant_core.data.for_model import samples_for
    from quant_core.evaluate.fidelity import compare
    from quant_core.model.session import open_session, run
    from quant_core.worker.host import OtherLoad

    drawn = replace(samples, labels=None, count=batch)
    feed = samples_for(original, drawn, original, quantized).batch(batch)
    load = OtherLoad(os.getpid())
    raced = race(runtime, (original, quantized), feed, threads=threads, seconds=seconds)
    row = raced.timing.to_dict() | load.until_now() | {"control": raced.control}
    paths = {"float_equal_db": original, "quantized_equal_db": quantized}
    for (key, path), outputs in zip(paths.items(), raced.outputs, strict=True):
        session = open_session(path)
        names = [output.name for output in session.get_outputs()]
        there = [[outputs[name] for name in names]]
        row[key] = compare([run(session, feed)], there, names).sqnr_db
    return row


def footprint(model: Path, samples: SampleSpec, threads: int, batch: int) -> dict[str, Any]:
    """How long a model takes to load in a new process, and how much memory there."""
    from quant_core.worker.child import run_stage, shut_down

    few = replace(samples, labels=None, count=batch)
    request = {"model": str(model), "samples": few.to_dict(), "threads": threads, "batch": batch}
    try:
        return dict(run_stage("footprint", request)["result"])
    finally:
        shut_down()


def comparison(
    original: Path,
    files: Sequence[Path],
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    progress: Progress,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """The original, and each file beside it: size, fidelity, verdict, timing and footprint; and how
    much of the host others took meanwhile.
    """
    from quant_core import judging
    from quant_core.evaluate.contract import judge
    from quant_core.model.info import model_info
    from quant_core.worker.host import OtherLoad

    contract, load = accuracy.contract, OtherLoad(os.getpid())
    compared = judging.compare_models(
        original,
        files,
        samples,
        metric=accuracy.metric or (contract.metric if contract else None),
        threads=threads,
        seconds=seconds,
        allow_code=accuracy.allow_code,
        progress=progress,
    )
    others = load.until_now()
    progress("loading each file in a new process")
    rows = []
    for path, row in zip(files, compared, strict=True):
        verdict, reason = judge(row.fidelity, contract) if contract else ("none", "no contract")
        judged = {"verdict": str(verdict), "reason": reason}
        rows.append(row.to_dict() | judged | footprint(path, samples, threads, 1))
    size_bytes = model_info(original).size_bytes
    first = {"file": str(original), "size_bytes": size_bytes}
    return {"original": first | footprint(original, samples, threads, 1), "files": rows} | others


def optimize_answer(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    costs: Path | None,
) -> Answer:
    """Rewrite a float model exactly, without quantizing it."""
    from quant_core import api

    others = [key for key in changed_options(config) if key != "fix_shape"]
    if others:
        hint = "Leave one of them out"
        raise RequestError("means nothing with --optimize-only", flag_of(others[0]), hint)
    result = api.optimize_model(model, output, calibration, costs=costs, fix_shape=config.fix_shape)
    following = command_line("benchmark", model, output)
    return Answer(result.to_dict() | {"next": following}, result_views.optimization_view)


def validation(
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    progress: Progress,
    detailed: bool = False,
    provider: str = "cpu",
) -> dict[str, Any]:
    """How right a quantized model is, and whether it meets the contract; `Validation.to_dict`."""
    from quant_core import judging

    return judging.validate_model(
        original,
        quantized,
        samples,
        metric=accuracy.metric,
        contract=accuracy.contract,
        detailed=detailed,
        allow_code=accuracy.allow_code,
        provider=provider,
        progress=progress,
    ).to_dict()


def _read_plan(path: Path) -> QuantPlan:
    from quant_core.plan.types import QuantPlan

    hint = "Write one with --dry-run --format json"
    try:
        return QuantPlan.from_json(path.read_text(encoding="utf-8"))
    except RequestError as error:
        raise RequestError(f"is not a plan: {error.problem}", str(path), hint) from error
    except UnicodeDecodeError as error:
        raise RequestError("is not a plan, but no text at all", str(path), hint) from error
    except OSError as error:
        raise RequestError(f"cannot be read: {reason_of(error)}", str(path), hint) from error
