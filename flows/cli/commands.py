"""The commands of `quantmill`. Each docstring here is the command's help.

Exit codes: 0 if all went well, 1 if something failed or missed its contract, 2 if the request
itself is wrong.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.command import Answer, register
from flows.cli.doctor import examine_host
from flows.cli.options import AccuracyOptions, changed_options
from flows.console import render
from flows.manifest.outputs import FOLDER
from flows.runtime.import_path import forget_current_folder
from flows.runtime.process import own_process
from flows.runtime.signals import stopped_in_order
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

if TYPE_CHECKING:
    from flows.manifest.jobs import Manifest
    from quant_core.plan.types import QuantPlan

# Heavy imports stand inside the commands: `--help` must not wait for onnx, nor `info` for Prefect.
app = typer.Typer(
    name="quantmill",
    help="Smaller, faster ONNX models that are still right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
command = register(app)


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def _option(*flags: str, help: str) -> Any:
    return typer.Option(*flags, help=help, show_default=False)


Model = Annotated[Path, _argument("MODEL", "A float ONNX model.")]
Original = Annotated[Path, _argument("ORIGINAL", "The float model.")]
Quantized = Annotated[Path, _argument("QUANTIZED", "What became of it.")]
Models = Annotated[list[Path], _argument("MODELS...", "Models, or one folder or 'glob' of them.")]
ManifestFile = Annotated[Path, _argument("FILE", "A YAML or TOML manifest.")]
Reports = Annotated[Path, _argument("DIR", "A batch's output folder.")]

Output = Annotated[
    Path | None, _option("-o", "--output", help="Where to write; replaced if there.")
]
Page = Annotated[Path | None, _option("-o", "--output", help="Where to write the HTML page.")]
OutputDir = Annotated[Path, _option("-o", "--output-dir", help="Where to write the models.")]
PlanFile = Annotated[Path | None, _option("--plan", help="Do exactly this: a dry run's JSON.")]
CostsFile = Annotated[
    Path | None, _option("--costs", help="What was timed: looked up, and added to.")
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="First write the Parquet again from the journal.")
]
RunId = Annotated[str | None, _option("--run", help="Of this run_id, not the latest.")]

SkipExisting = Annotated[
    bool, typer.Option("--skip-existing/--no-skip-existing", help="Keep what is up to date.")
]
ContinueOnError = Annotated[
    bool, typer.Option("--continue-on-error/--stop-on-error", help="When a model fails.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
OptimizeOnly = Annotated[
    bool, typer.Option("--optimize-only", help="Rewrite the float model exactly, and stop.")
]
Detailed = Annotated[bool, typer.Option("--detailed", help="Say which node costs how much.")]
Threads = Annotated[int, typer.Option("--threads", min=1, max=1024, help="Of each model.")]
Seconds = Annotated[
    float, typer.Option("--seconds", min=0.1, max=3600, help="How long to measure.")
]

Progress = Callable[[str], None]


@command
def info(model: Model) -> Answer:
    """What a model is: inputs, outputs, opset, size, operators."""
    from quant_core.model.info import model_info

    return Answer(model_info(model).to_dict(), render.model_view)


@command
def quantize(
    model: Model,
    calibration: SampleSpec | None,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    progress: Progress,
    output: Output = None,
    plan: PlanFile = None,
    costs: CostsFile = None,
    dry_run: DryRun = False,
    optimize_only: OptimizeOnly = False,
) -> Answer:
    """Write a smaller, faster model; with --data, one that computes in integers where that pays."""
    if dry_run:
        return _plan_answer(model, config, calibration)
    if output is None:
        hint = "Say where to write: -o OUT.onnx, or --dry-run to see the plan"
        raise RequestError("is missing", "--output", hint)
    if optimize_only:
        return _optimize_answer(model, output, config, calibration, costs)
    if plan is not None and (changed := changed_options(config)):
        option = "--" + next(iter(changed)).replace("_", "-")
        hint = f"Leave it out, or change it in {plan}"
        raise RequestError("is decided by the plan already", option, hint)
    if calibration is None and (needless := _first_accuracy_option(accuracy)):
        raise RequestError("means nothing without samples", needless, "Give --data")
    return _quantize_answer(
        model, output, config, calibration, accuracy, allow_code, progress, costs, plan
    )


@command
def calibrate(
    model: Model,
    calibration: SampleSpec | None,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    progress: Progress,
    output: Output = None,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> Answer:
    """Quantize with ranges measured on --data; written to MODEL_int8.onnx unless -o says where."""
    if calibration is None:
        hint = "A .npy, a .npz, a folder of .npz feeds, or random"
        raise RequestError("is missing", "--data", hint)
    if dry_run:
        return _plan_answer(model, config, calibration)
    default = model.with_name(f"{model.stem}_int{config.bits}.onnx")
    return _quantize_answer(
        model, output or default, config, calibration, accuracy, allow_code, progress, costs
    )


@command
def validate(
    original: Original,
    quantized: Quantized,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    progress: Progress,
    detailed: Detailed = False,
) -> Answer:
    """How right a quantized model is, against its original; on random samples without --data."""
    progress("comparing the two models")
    found = _validation(original, quantized, samples, accuracy, allow_code, detailed)
    return Answer(found, render.validation_view, exit_code=int(found["verdict"] == "not_met"))


@command
def benchmark(
    original: Original,
    quantized: Quantized,
    samples: SampleSpec,
    progress: Progress,
    threads: Threads = 1,
    seconds: Seconds = 3.0,
) -> Answer:
    """How fast a quantized model is, against its original: both in turn, in this process."""
    from quant_core import api
    from quant_core.worker.host import OtherLoad

    progress("timing both models in turn")
    load = OtherLoad(os.getpid())
    timing = api.benchmark_model(
        original,
        quantized,
        samples.source,
        threads=threads,
        seconds=seconds,
        sample_shape=samples.shape,
    )
    return Answer(timing.to_dict() | load.until_now(), render.timing_view)


@command
def batch(
    models: Models,
    output_dir: OutputDir,
    samples: SampleSpec,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    running: dict[str, Any],
    as_json: bool,
    skip_existing: SkipExisting = True,
    continue_on_error: ContinueOnError = True,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> Answer | int:
    """Quantize many models on all cores; what is finished survives whatever happens to the rest."""
    from flows.manifest.jobs import check_manifest

    if accuracy.metric and not accuracy.contract:
        raise RequestError("alone promises nothing", "--metric", "Add --max-drop or --min")
    is_folder_or_glob = len(models) == 1 and not models[0].is_file()
    manifest = check_manifest(
        {
            **changed_options(config),
            "models": [] if is_folder_or_glob else [{"input": str(model)} for model in models],
            "batch": {
                "input_dir": str(models[0]) if is_folder_or_glob else None,
                "output_dir": str(output_dir),
                "skip_existing": skip_existing,
                "continue_on_error": continue_on_error,
                "costs": costs and str(costs),
            },
            "calibration": {
                "data": samples.source,
                "labels": samples.labels and str(samples.labels),
                "num_samples": samples.count,
                "shape": samples.shape or {},
            },
            "contract": accuracy.contract and accuracy.contract.to_dict(),
        },
        Path.cwd(),
        "command line",
    )
    return _run_manifest(manifest, {**running, "allow_code": allow_code}, as_json, dry_run)


@command
def config(
    file: ManifestFile,
    allow_code: Path | None,
    running: dict[str, Any],
    as_json: bool,
    dry_run: DryRun = False,
) -> Answer | int:
    """Do what a YAML or TOML manifest says; the same as `python -m flows.batch FILE`."""
    from flows.manifest.jobs import read_manifest

    running = {**running, "allow_code": allow_code}
    return _run_manifest(read_manifest(file), running, as_json, dry_run)


@command
def report(
    folder: Reports, run: RunId = None, output: Page = None, rebuild: Rebuild = False
) -> Answer:
    """What a batch came to: its latest run, or another one, from the Parquet in its output
    folder; with -o, also as an HTML page that opens offline.
    """
    from flows.cli.read_reports import read_reports

    if rebuild:
        if not (folder / FOLDER / "journal.jsonl").is_file():
            raise RequestError("holds no journal", str(folder), "Name a batch's output folder")
        from flows.batch.rebuild import rebuild as rebuild_reports  # it imports Prefect

        rebuild_reports(folder)
    if output is not None:
        from flows.report.page import write_report

        write_report(folder, output, run)
    return Answer(read_reports(folder, run), render.reports_view)


@command
def doctor() -> Answer:
    """What this host is: target, threads, memory, versions, and what is known not to work
    together.
    """
    report = examine_host()
    return Answer(report, render.host_view, exit_code=int(bool(report["problems"])))


def _run_manifest(
    manifest: Manifest, running: dict[str, Any], as_json: bool, dry_run: bool
) -> Answer | int:
    """Make the models of a manifest, or with `dry_run` only print their plans."""
    from flows.batch.run import plan_batch, run_and_show

    if dry_run:
        plans = list(plan_batch(manifest, **_selection(running)))
        return Answer(plans, render.plans_view, exit_code=int(any(row["error"] for row in plans)))
    return run_and_show(manifest, as_json=as_json, **running)


def _selection(running: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a dry run needs as well."""
    return {key: running[key] for key in ("only", "allow_code") if key in running}


def _plan_answer(model: Path, config: QuantConfig, calibration: SampleSpec | None) -> Answer:
    from quant_core import api

    samples = calibration or SampleSpec()
    plan = api.plan_model(
        model,
        config,
        None if calibration is None else samples.source,
        num_samples=samples.count,
        sample_shape=samples.shape,
    )
    return Answer(plan.to_dict(), render.plan_view)


def _first_accuracy_option(accuracy: AccuracyOptions) -> str | None:
    """The first of `--metric`, `--max-drop` and `--min` that was typed; None if none was."""
    contract = accuracy.contract
    typed = {
        "--metric": accuracy.metric,
        "--max-drop": contract and contract.max_drop,
        "--min": contract and contract.min,
    }
    return next((option for option, value in typed.items() if value is not None), None)


def _quantize_answer(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    progress: Progress,
    costs: Path | None,
    plan: Path | None = None,
) -> Answer:
    """Quantize a model; compare it with the original if a metric, contract or labels were given."""
    from quant_core import api

    samples = calibration or SampleSpec()
    result = api.quantize_model(
        model,
        output,
        config,
        calibration=None if calibration is None else samples.source,
        labels=samples.labels,
        num_samples=samples.count,
        sample_shape=samples.shape,
        contract=accuracy.contract,
        plan=_read_plan(plan) if plan else None,
        costs=costs,
        progress=progress,
        allow_code=allow_code,
    ).to_dict()
    if calibration and (accuracy.metric or accuracy.contract or calibration.labels):
        progress("comparing it with the original")
        result |= _validation(model, output, calibration, accuracy, allow_code)
        if result["shortfall"]:
            result |= {"verdict": "not_met", "reason": result["shortfall"]}
    return Answer(
        result, render.quantization_view, exit_code=int(result.get("verdict") == "not_met")
    )


def _optimize_answer(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    costs: Path | None,
) -> Answer:
    """Rewrite a float model exactly, without quantizing it."""
    from quant_core import api

    if changed := changed_options(config):
        option = "--" + next(iter(changed)).replace("_", "-")
        raise RequestError("means nothing with --optimize-only", option, "Leave one of them out")
    samples = calibration or SampleSpec()
    result = api.optimize_model(
        model,
        output,
        None if calibration is None else samples.source,
        num_samples=samples.count,
        sample_shape=samples.shape,
        costs=costs,
    )
    return Answer(result.to_dict(), render.optimization_view)


def _validation(
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    detailed: bool = False,
) -> dict[str, Any]:
    from quant_core import api

    return api.validate_model(
        original,
        quantized,
        samples.source,
        labels=samples.labels,
        metric=accuracy.metric,
        contract=accuracy.contract,
        num_samples=samples.count,
        sample_shape=samples.shape,
        detailed=detailed,
        allow_code=allow_code,
    ).to_dict()


def _read_plan(path: Path) -> QuantPlan:
    from quant_core.plan.types import QuantPlan

    hint = "Write one with --dry-run --format json"
    try:
        return QuantPlan.from_json(path.read_text(encoding="utf-8"))
    except RequestError as error:
        raise RequestError(f"is not a plan: {error.problem}", str(path), hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot be read: {error}", str(path), hint) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's. Returns the exit code."""
    # onnx_ir would print a model's names with their control characters.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    if arguments is None:
        forget_current_folder()
        own_process()
    try:
        with stopped_in_order():
            app(list(sys.argv[1:] if arguments is None else arguments), prog_name="quantmill")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
