"""The commands of `quantmill`. Each docstring here is the command's help.

Exit codes: 0 if all went well, 1 if something failed or missed its contract, 2 if the request
itself is wrong.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.cli.answers import (
    Progress,
    command_line,
    comparison,
    first_accuracy_option,
    footprint,
    for_export,
    javascript_timing,
    optimize_answer,
    plan_answer,
    quantize_answer,
    timing,
    validation,
    with_export,
)
from flows.cli.command import Answer, CommandGroup, UsageError, register, usage_error
from flows.cli.doctor import examine_host
from flows.cli.options import AccuracyOptions, changed_options
from flows.console import model_views, printing, result_views, run_views, timing_views
from flows.manifest.outputs import FOLDER
from flows.runtime.import_path import forget_current_folder
from flows.runtime.process import own_process
from flows.runtime.signals import stopped_in_order
from quant_core import __version__
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

if TYPE_CHECKING:
    from flows.manifest.jobs import Manifest

# Heavy imports stand inside the commands: `--help` must not wait for onnx, nor `info` for Prefect.
app = typer.Typer(
    name="quantmill",
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
command = register(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantmill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Smaller, faster ONNX models that are still right."""


def _argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def _option(*flags: str, help: str, metavar: str | None = "FILE") -> Any:
    return typer.Option(*flags, help=help, metavar=metavar, show_default=False)


Model = Annotated[Path, _argument("MODEL", "A float ONNX model.")]
AnyModel = Annotated[Path, _argument("MODEL", "An ONNX model, quantized or not.")]
Original = Annotated[Path, _argument("ORIGINAL", "The float model.")]
Quantized = Annotated[Path, _argument("QUANTIZED", "The quantized model.")]
Files = Annotated[
    list[Path], _argument("QUANTIZED", "Quantized files of it, whichever tool made them.")
]
Models = Annotated[list[str], _argument("MODELS", "Models, or one folder or 'glob' of them.")]
ManifestFile = Annotated[Path, _argument("FILE", "A YAML or TOML manifest.")]
ModelFolder = Annotated[Path, _argument("DIR", "A folder of models.")]
Reports = Annotated[Path, _argument("DIR", "A batch's output folder.")]

Output = Annotated[
    Path | None,
    _option(
        "-o",
        "--output",
        help="The file to write, replaced if it is there; without it, MODEL_int8.onnx.",
    ),
]
Page = Annotated[Path | None, _option("-o", "--output", help="Also write it as an HTML page.")]
OutputDir = Annotated[
    str | None, _option("-o", "--output-dir", help="The folder to write to.", metavar="DIR")
]
Layout = Annotated[
    Literal["huggingface"] | None,
    _option("--layout", help="MODELS is one folder of this layout, made as a whole.", metavar=None),
]
PlanFile = Annotated[
    Path | None, _option("--plan", help="Follow this plan: the JSON of a dry run.")
]
CostsFile = Annotated[
    Path | None,
    _option(
        "--costs",
        help="File of timings, looked up and added to: with it the same input gives the same file.",
    ),
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="First write the Parquet again from the journal.")
]
RunId = Annotated[
    str | None, _option("--run", help="Show the run of this id, not the latest.", metavar="ID")
]

SkipExisting = Annotated[
    bool,
    typer.Option(
        "--skip-existing/--no-skip-existing", help="Whether outputs that are up to date stay."
    ),
]
ContinueOnError = Annotated[
    bool,
    typer.Option("--continue-on-error/--stop-on-error", help="What happens when a model fails."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
OptimizeOnly = Annotated[
    bool, typer.Option("--optimize-only", help="Only rewrite the float model exactly.")
]
Export = Annotated[
    Literal["openvino"] | None,
    typer.Option("--export", help="Also write .xml and .bin for OpenVINO, and check them there."),
]
Provider = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="Execution provider of both, such as cpu, cuda or openvino",
    ),
]
Pareto = Annotated[
    bool,
    typer.Option(
        "--pareto", help="Try all plans that may be best, and show those that none beats."
    ),
]
Detailed = Annotated[bool, typer.Option("--detailed", help="Say what each node costs.")]
Threads = Annotated[
    list[int],
    typer.Option(
        "--threads", min=1, max=1024, metavar="N", help="Threads of each model; repeatable."
    ),
]
ThreadCount = Annotated[
    int, typer.Option("--threads", min=1, max=1024, metavar="N", help="Threads of the model.")
]
BatchSizes = Annotated[
    list[int],
    typer.Option("--batch", min=1, max=65536, metavar="N", help="Samples in a feed; repeatable."),
]
Seconds = Annotated[
    float,
    typer.Option("--seconds", min=0.1, max=3600, metavar="S", help="How long to measure."),
]
Runtime = Annotated[
    Literal["python", "node", "web", "wasm"],
    typer.Option(
        "--runtime",
        help="onnxruntime in Python or node; onnxruntime-web in Chromium (web) or node (wasm).",
    ),
]


@command
def info(model: Model) -> Answer:
    """What a model is: inputs, outputs, opset, size, operators."""
    from quant_core.model.info import model_info
    from quant_core.optimize.applied import rewrites_in

    found = model_info(model)
    following = command_line("explain" if found.quantized else "quantize", model)
    answer = found.to_dict() | {"rewrites": rewrites_in(model), "next": following}
    return Answer(answer, model_views.model_view)


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
    export: Export = None,
    pareto: Pareto = False,
) -> Answer:
    """Write a smaller, faster model; with --data, one that computes in integers where that pays."""
    if export is not None:
        config = for_export(export, config, plan)
    if dry_run:
        return plan_answer(model, config, calibration)
    if optimize_only:
        output = output or model.with_name(f"{model.stem}_optimized.onnx")
        return optimize_answer(model, output, config, calibration, costs)
    if plan is not None and (changed := changed_options(config)):
        option = "--" + next(iter(changed)).replace("_", "-")
        hint = f"Leave it out, or change it in {plan}"
        raise RequestError("is decided by the plan already", option, hint)
    needless = first_accuracy_option(accuracy) or ("--pareto" if pareto else None)
    if calibration is None and needless:
        raise RequestError("means nothing without samples", needless, "Give --data")
    if plan is not None and pareto:
        raise RequestError("means nothing with --plan", "--pareto", "Leave one of them out")
    answer = quantize_answer(
        model, output, config, calibration, accuracy, allow_code, progress, costs, plan, pareto
    )
    if export is None:
        return answer
    progress("checking the export in OpenVINO")
    return with_export(answer, model, calibration)


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
    """Quantize with ranges measured on --data; the same as `quantize` with samples."""
    if calibration is None:
        hint = "A .npy, a .npz, a folder of .npz feeds, or random"
        raise RequestError("is missing", "--data", hint)
    if dry_run:
        return plan_answer(model, config, calibration)
    return quantize_answer(
        model, output, config, calibration, accuracy, allow_code, progress, costs
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
    provider: Provider = "cpu",
) -> Answer:
    """How right a quantized model is, against its original; on random samples without --data."""
    progress("comparing the two models")
    found = validation(
        original, quantized, samples, accuracy, allow_code, progress, detailed, provider
    )
    is_missed = found["verdict"] == "not_met"
    found["next"] = (
        command_line("validate", original, quantized, "--data", str(samples.source), "--detailed")
        if is_missed and not detailed
        else command_line("benchmark", original, quantized)
    )
    return Answer(found, result_views.validation_view, exit_code=int(is_missed))


@command
def benchmark(
    original: Original,
    quantized: Quantized,
    samples: SampleSpec,
    progress: Progress,
    threads: Threads = [1],  # noqa: B006 - typer reads it as the default
    batch: BatchSizes = [1],  # noqa: B006
    seconds: Seconds = 3.0,
    runtime: Runtime = "python",
) -> Answer:
    """How fast a quantized model is, against its original.

    Both run in turn, in this process; what each takes to load, and how much memory, is said too.
    With --runtime, JavaScript runs them.
    """
    time_both = timing if runtime == "python" else partial(javascript_timing, runtime)
    rows, settings = [], list(itertools.product(threads, batch))
    for i, (thread_count, batch_size) in enumerate(settings):
        setting = f"{thread_count} threads, {batch_size} in a feed"
        left = f"{seconds * (len(settings) - i):.0f} s left"
        progress(f"timing both models in turn: {setting}; {left}")
        timed = time_both(original, quantized, samples, thread_count, batch_size, seconds)
        rows.append({"batch": batch_size, **timed})
    if runtime != "python":
        return Answer({**rows[0], "timings": rows, "footprints": None}, timing_views.timing_view)
    following = command_line("explain", quantized)
    progress("loading both models")
    footprints = {
        name: footprint(path, samples, threads[0], batch[0])
        for name, path in (("float", original), ("quantized", quantized))
    }
    answer = {**rows[0], "timings": rows, "footprints": footprints, "next": following}
    return Answer(answer, timing_views.timing_view)


@command
def explain(
    model: AnyModel,
    samples: SampleSpec,
    config: QuantConfig,
    progress: Progress,
    threads: ThreadCount = 1,
    seconds: Seconds = 1.0,
    output: Page = None,
) -> Answer:
    """Which kernels run a model on this CPU, whichever tool made it.

    Says of each whether it computes in integers and why not, what it costs, and what quantmill
    would do with it; the options of `quantize` steer that.
    """
    from quant_core import api

    progress(f"timing every kernel for {seconds:.0f} s")
    explanation = api.explain_model(
        model,
        config,
        samples,
        threads=threads,
        seconds=seconds,
    ).to_dict()
    if output is not None:
        from flows.report.command_pages import write_explanation

        write_explanation(explanation, output)
    if not explanation["is_quantized"]:
        explanation["next"] = command_line("quantize", model, "--data", str(samples.source))
    return Answer(explanation, timing_views.explanation_view)


@command
def compare(
    original: Original,
    files: Files,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    progress: Progress,
    threads: ThreadCount = 1,
    seconds: Seconds = 3.0,
    output: Page = None,
) -> Answer:
    """Several quantized files of one model side by side, whichever tool made them.

    Says their size, accuracy, latency, load time and memory; all run in turn.
    """
    progress(f"comparing all files with the original; timing takes {seconds * len(files):.0f} s")
    rows = comparison(original, files, samples, accuracy, allow_code, threads, seconds)
    if output is not None:
        from flows.report.command_pages import write_comparison

        write_comparison(rows, output)
    missed = any(row["verdict"] == "not_met" for row in rows["files"])
    return Answer(rows, timing_views.comparison_view, exit_code=int(missed))


@command
def batch(
    models: Models,
    samples: SampleSpec,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    allow_code: Path | None,
    running: dict[str, Any],
    as_json: bool,
    output_dir: OutputDir = None,
    layout: Layout = None,
    skip_existing: SkipExisting = True,
    continue_on_error: ContinueOnError = True,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> Answer | int:
    """Quantize many models on all cores; what is finished survives whatever happens to the rest."""
    from flows.manifest.read import check_manifest

    if accuracy.metric and not accuracy.contract:
        raise RequestError("alone promises nothing", "--metric", "Add --max-drop or --min")
    is_folder_or_glob = len(models) == 1 and not _names_a_model(models[0])
    if layout and not is_folder_or_glob:
        raise RequestError("takes one folder", "--layout", "Name the folder of one model")
    if output_dir is None:
        if not layout:
            raise RequestError("is missing", "--output-dir", "Say where to write: -o DIR")
        folder = Path(models[0]).absolute()
        output_dir = str(folder.with_name(f"{folder.name}_int{config.bits}"))
    manifest = check_manifest(
        {
            **changed_options(config),
            "models": [] if is_folder_or_glob else [{"input": model} for model in models],
            "batch": {
                "input_dir": models[0] if is_folder_or_glob else None,
                "output_dir": output_dir,
                "layout": layout,
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


def _names_a_model(text: str) -> bool:
    """Whether this is one model, and no folder or glob of models."""
    from tasks.stores import is_url

    if is_url(text):
        return text.endswith(".onnx") and not has_magic(text)
    return Path(text).is_file()


@command
def config(
    file: ManifestFile,
    allow_code: Path | None,
    running: dict[str, Any],
    as_json: bool,
    dry_run: DryRun = False,
) -> Answer | int:
    """Do what a YAML or TOML manifest says; the same as `python -m flows.batch FILE`."""
    from flows.manifest.read import read_manifest

    running = {**running, "allow_code": allow_code}
    return _run_manifest(read_manifest(file), running, as_json, dry_run)


@command
def init(
    folder: ModelFolder,
    output: Annotated[
        Path | None,
        _option("-o", "--output", help="The manifest to write; DIR/quantmill.yaml if left out."),
    ] = None,
) -> Answer:
    """Write a commented manifest for a folder of models, with the data that lie beside them."""
    from flows.manifest.draft import draft_manifest

    path, models = draft_manifest(folder, output)
    rows = [model.to_dict(path.parent) for model in models]
    following = command_line("config", path, "--dry-run")
    answer = {"manifest": str(path), "models": rows, "next": following}
    return Answer(answer, model_views.draft_view)


@command
def report(
    folder: Reports, run: RunId = None, output: Page = None, rebuild: Rebuild = False
) -> Answer:
    """What a batch came to, in its latest run or another one.

    It is read from the Parquet in the output folder. With -o it is written as an HTML page that
    opens offline.
    """
    from flows.reading import read_reports

    rebuilt: dict[str, Any] = {}
    if rebuild:
        if not (folder / FOLDER / "journal.jsonl").is_file():
            raise RequestError("holds no journal", str(folder), "Name a batch's output folder")
        from flows.batch.rebuild import rebuild as rebuild_reports

        files, skipped_lines = rebuild_reports(folder)
        rebuilt = {"rebuilt": [str(path) for path in files], "skipped_lines": skipped_lines}
    if output is not None:
        from flows.report.page import write_report

        write_report(folder, output, run)
    return Answer(read_reports(folder, run) | rebuilt, run_views.reports_view)


@command
def doctor() -> Answer:
    """What this host is, and which of its versions are known not to work together."""
    report = examine_host()
    return Answer(report, model_views.host_view, exit_code=int(bool(report["problems"])))


def _run_manifest(
    manifest: Manifest, running: dict[str, Any], as_json: bool, dry_run: bool
) -> Answer | int:
    """Make the models of a manifest, or with `dry_run` only print their plans."""
    from flows.batch.run import plan_batch, run_and_show

    if dry_run:
        plans = list(plan_batch(manifest, **_selection(running)))
        return Answer(
            plans, model_views.plans_view, exit_code=int(any(row["error"] for row in plans))
        )
    return run_and_show(manifest, as_json=as_json, **running)


def _selection(running: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a dry run needs as well."""
    return {key: running[key] for key in ("only", "allow_code") if key in running}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default this process's. Returns the exit code."""
    # onnx_ir would print a model's names with their control characters.
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        forget_current_folder()
        own_process()
    try:
        with stopped_in_order():
            return app(words, prog_name="quantmill", standalone_mode=False) or 0
    except UsageError as error:
        wrong = usage_error(error)
        if wrong.problem:  # else there was no argument at all, and the help is printed
            as_json = "--format json" in " ".join(words).replace("=", " ")
            printing.print_error(wrong, as_json)
        return wrong.exit_code
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
