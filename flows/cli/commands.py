"""`quantmill`: what a person types. Exit code 0: all met, 1: something failed, 2: the request itself was wrong."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli import doctor as host
from flows.cli import options
from flows.cli.options import AccuracyOptions, Answer
from flows.console import render
from flows.runtime.signals import stopped_in_order
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

if TYPE_CHECKING:
    from flows.manifest.jobs import Manifest
    from quant_core.plan.types import QuantPlan

# Heavy imports stand inside the commands: `--help` must not wait for onnx, nor `info` for Prefect.
app = typer.Typer(name="quantmill", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Smaller, faster ONNX models that are still right.")  # fmt: skip
command = options.register(app)

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A float ONNX model.", show_default=False)
]
Original = Annotated[
    Path, typer.Argument(metavar="ORIGINAL", help="The float model.", show_default=False)
]
Quantized = Annotated[
    Path, typer.Argument(metavar="QUANTIZED", help="What became of it.", show_default=False)
]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Where to write; replaced if there.", show_default=False),
]
Folder = Annotated[
    Path, typer.Option("-o", "--output-dir", help="Where to write the models.", show_default=False)
]
Models = Annotated[
    list[Path],
    typer.Argument(
        metavar="MODELS...", help="Models, or one folder or 'glob' of them.", show_default=False
    ),
]
ManifestFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="A YAML or TOML manifest.", show_default=False)
]
SkipExisting = Annotated[
    bool, typer.Option("--skip-existing/--no-skip-existing", help="Keep what is up to date.")
]
ContinueOnError = Annotated[
    bool, typer.Option("--continue-on-error/--stop-on-error", help="When a model fails.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", help="Do exactly this: a dry run's JSON.", show_default=False),
]
CostsFile = Annotated[
    Path | None,
    typer.Option("--costs", help="What was timed: looked up, and added to.", show_default=False),
]
Detailed = Annotated[bool, typer.Option("--detailed", help="Say which node costs how much.")]
Reports = Annotated[
    Path, typer.Argument(metavar="DIR", help="A batch's output folder.", show_default=False)
]
Run = Annotated[
    str | None, typer.Option("--run", help="Of this run_id, not the latest.", show_default=False)
]
Progress = Callable[[str], None]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Of each model.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure.")]


@command
def info(model: Model) -> Answer:
    """What a model is: inputs, outputs, opset, size, operators."""
    from quant_core.model.info import model_info

    return Answer(model_info(model).to_dict(), render.model_info)


@command
def quantize(
    model: Model,
    calibration: SampleSpec | None,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    progress: Progress,
    output: Output = None,
    plan: PlanFile = None,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> Answer:
    """Write a smaller, faster model; with --data, one that computes in integers where that pays."""
    if dry_run:
        return _planned(model, config, calibration)
    if output is None:
        raise RequestError(
            "is missing",
            "--output",
            "Say where to write: -o OUT.onnx, or --dry-run to see the plan",
        )
    if plan is not None and (said := options.said_keys(config)):
        option = "--" + next(iter(said)).replace("_", "-")
        raise RequestError(
            "is decided by the plan already", option, f"Leave it out, or change it in {plan}"
        )
    if calibration is None and (idle := _typed_accuracy(accuracy)):
        raise RequestError("means nothing without samples", f"--{idle}", "Give --data")
    return _quantized(model, output, config, calibration, accuracy, progress, costs, plan)


@command
def calibrate(
    model: Model,
    calibration: SampleSpec | None,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    progress: Progress,
    output: Output = None,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> Answer:
    """Quantize with ranges measured on --data; written to MODEL_int8.onnx unless -o says where."""
    if calibration is None:
        raise RequestError(
            "is missing", "--data", "A .npy, a .npz, a folder of .npz feeds, or random"
        )
    if dry_run:
        return _planned(model, config, calibration)
    default = model.with_name(f"{model.stem}_int{config.bits}.onnx")
    return _quantized(model, output or default, config, calibration, accuracy, progress, costs)


@command
def validate(
    original: Original,
    quantized: Quantized,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    progress: Progress,
    detailed: Detailed = False,
) -> Answer:
    """How right a quantized model is, against its original; on random samples without --data."""
    progress("comparing the two models")
    found = _validation(original, quantized, samples, accuracy, detailed)
    return Answer(found, render.validation, exit_code=int(found["verdict"] == "not_met"))


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

    progress("timing both models in turn")
    timing = api.benchmark_model(
        original,
        quantized,
        samples.source,
        threads=threads,
        seconds=seconds,
        sample_shape=samples.shape,
    )
    return Answer(timing.to_dict(), render.timing)


@command
def batch(
    models: Models,
    output_dir: Folder,
    samples: SampleSpec,
    config: QuantConfig,
    accuracy: AccuracyOptions,
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
    many = len(models) == 1 and not models[0].is_file()
    manifest = check_manifest(
        {
            **options.said_keys(config),
            "models": [] if many else [{"input": str(model)} for model in models],
            "batch": {
                "input_dir": str(models[0]) if many else None,
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
    return _carried_out(manifest, running, as_json, dry_run)


@command
def config(
    file: ManifestFile, running: dict[str, Any], as_json: bool, dry_run: DryRun = False
) -> Answer | int:
    """Do what a YAML or TOML manifest says; the same as `python -m flows.batch FILE`."""
    from flows.manifest.jobs import read_manifest

    return _carried_out(read_manifest(file), running, as_json, dry_run)


@command
def report(folder: Reports, run: Run = None) -> Answer:
    """What a batch came to: its latest run, or another one, from the Parquet in its output folder."""
    from flows.cli.read_reports import read_reports

    return Answer(read_reports(folder, run), render.reports)


@command
def doctor() -> Answer:
    """What this host is: target, threads, memory, versions, and what is known not to work together."""
    report = host.examine()
    return Answer(report, render.health, exit_code=int(bool(report["problems"])))


def _carried_out(
    manifest: Manifest, running: dict[str, Any], as_json: bool, dry_run: bool
) -> Answer | int:
    from flows.batch.run import plan_batch, run_and_show

    if dry_run:
        plans = list(plan_batch(manifest, only=running.get("only", ())))
        return Answer(plans, render.plans, exit_code=int(any(row["error"] for row in plans)))
    return run_and_show(manifest, as_json=as_json, **running)


def _planned(model: Path, config: QuantConfig, calibration: SampleSpec | None) -> Answer:
    from quant_core import api

    samples = calibration or SampleSpec()
    plan = api.plan_model(
        model,
        config,
        None if calibration is None else samples.source,
        num_samples=samples.count,
        sample_shape=samples.shape,
    )
    return Answer(plan.to_dict(), render.plan)


def _typed_accuracy(accuracy: AccuracyOptions) -> str | None:
    """The first option about accuracy that was typed, None if there is none."""
    contract = accuracy.contract
    typed = {
        "metric": accuracy.metric,
        "max-drop": contract and contract.max_drop,
        "min": contract and contract.min,
    }
    return next((option for option, value in typed.items() if value is not None), None)


def _quantized(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    accuracy: AccuracyOptions,
    progress: Progress,
    costs: Path | None,
    plan: Path | None = None,
) -> Answer:
    """Quantize, and where accuracy was asked for, say what it is and whether the contract was met."""
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
    ).to_dict()
    if calibration and (accuracy.metric or accuracy.contract or calibration.labels):
        progress("comparing it with the original")
        result |= _validation(model, output, calibration, accuracy)
    return Answer(result, render.quantized, exit_code=int(result.get("verdict") == "not_met"))


def _validation(
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
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
    """The exit code."""
    logging.getLogger("onnx_ir").addHandler(
        logging.NullHandler()
    )  # it would print names as they are
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # a name that the terminal cannot show is no reason to fail
    try:
        with stopped_in_order():
            app(list(sys.argv[1:] if arguments is None else arguments), prog_name="quantmill")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
