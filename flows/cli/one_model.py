"""The commands of `quantmill` about one model. Each docstring here is the command's help."""

from __future__ import annotations

import itertools
from functools import partial

from flows.cli.answers import (
    comparison,
    optimize_answer,
    plan_answer,
    quantize_answer,
    read_plan,
    validation,
)
from flows.cli.checks import (
    changed_options,
    check_labels,
    first_accuracy_option,
    first_measured_option,
    refuse_beside,
)
from flows.cli.command import Answer
from flows.cli.export import check_export, for_export, with_export
from flows.cli.groups import AccuracyOptions
from flows.cli.next_commands import command_line, detailed_validation
from flows.cli.parameters import (
    AnyModel,
    BatchSizes,
    CostsFile,
    Detailed,
    DryRun,
    Export,
    Files,
    Model,
    OptimizeOnly,
    Original,
    Output,
    Page,
    Pareto,
    PlanFile,
    Provider,
    Quantized,
    Runtime,
    Seconds,
    ThreadCount,
    Threads,
)
from flows.cli.timings import footprint, javascript_timing, timing
from flows.console import model_views, result_views, timing_views
from flows.console.flags import flag
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.deadline import Progress
from quant_core.errors import RequestError
from quant_core.text import counted

# Heavy imports stand inside the commands: `--help` must not wait for onnx.


def info(model: AnyModel) -> Answer:
    """Show what a model is: inputs, outputs, opset, size, operators, and what it stores."""
    from quant_core.model.info import model_info
    from quant_core.optimize.applied import rewrites_in

    found = model_info(model)
    following = command_line("explain" if found.quantized else "quantize", model)
    answer = found.to_dict() | {"rewrites": rewrites_in(model), "next": following}
    return Answer(answer, model_views.model_view)


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
    optimize_only: OptimizeOnly = False,
    export: Export = None,
    pareto: Pareto = False,
) -> Answer:
    """Write a smaller, faster model; with --data, one that computes in integers where that pays."""
    judged = first_accuracy_option(accuracy)
    if optimize_only:
        searched = {"--plan": plan, "--pareto": pareto, "--export": export, str(judged): judged}
        refuse_beside("--optimize-only", {"--dry-run": dry_run, **searched})
        output = output or model.with_name(f"{model.stem}_optimized.onnx")
        return optimize_answer(model, output, config, calibration, costs)
    if plan is not None:
        refuse_beside("--plan", {"--dry-run": dry_run, "--pareto": pareto})
    needless = judged or ("--pareto" if pareto else first_measured_option(config))
    if calibration is None and needless:
        raise RequestError("means nothing without samples", needless, "Give --data")
    if export is not None:
        config = for_export(export, config, plan)
    if dry_run:
        return plan_answer(model, config, calibration)
    if plan is not None and (changed := changed_options(config)):
        hint = f"Leave it out, or change it in {plan}"
        raise RequestError("is decided by the plan already", flag(next(iter(changed))), hint)
    followed = read_plan(plan) if plan is not None else None
    bits = (followed.config if followed is not None else config).bits
    output = output or model.with_name(f"{model.stem}_int{bits}.onnx")
    if export is not None:
        check_export(output)
    answer = quantize_answer(
        model, output, config, calibration, accuracy, progress, costs, followed, pareto
    )
    if export is None:
        return answer
    progress("checking the export in OpenVINO")
    return with_export(answer, model, calibration)


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
    """Quantize with ranges measured on --data; the same as `quantize` with samples."""
    if calibration is None:
        hint = "A .npy, a .npz, a folder of .npz feeds, or random"
        raise RequestError("is missing", "--data", hint)
    return quantize(model, calibration, config, accuracy, progress, output, None, costs, dry_run)


def validate(
    original: Original,
    quantized: Quantized,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    progress: Progress,
    detailed: Detailed = False,
    provider: Provider = "cpu",
) -> Answer:
    """Measure how right a quantized model is beside its original.

    Without --data it is measured on random samples.
    """
    check_labels(accuracy, samples)
    progress("comparing the two models")
    found = validation(original, quantized, samples, accuracy, progress, detailed, provider)
    is_missed = found["verdict"] == "not_met"
    following = command_line("benchmark", original, quantized)
    if samples.is_random:
        following = command_line("validate", original, quantized, "--data", "SAMPLES.npz")
    elif is_missed and not detailed:
        following = detailed_validation(original, quantized, samples)
    found["next"] = following
    return Answer(found, result_views.validation_view, exit_code=int(is_missed))


def benchmark(
    original: Original,
    quantized: Quantized,
    feeds: SampleSpec,
    progress: Progress,
    threads: Threads = [1],  # noqa: B006 - typer reads it as the default
    batch: BatchSizes = [1],  # noqa: B006
    seconds: Seconds = 3.0,
    runtime: Runtime = "python",
) -> Answer:
    """Measure how fast a quantized model is beside its original.

    Both run in turns in this process. How long each takes to load, and its memory, are measured
    too. With --runtime, JavaScript runs them.
    """
    time_both = timing if runtime == "python" else partial(javascript_timing, runtime)
    settings = list(itertools.product(threads, batch))
    rows = []
    for i, (thread_count, batch_size) in enumerate(settings):
        setting = f"{counted(thread_count, 'thread')}, {batch_size} in a feed"
        progress(f"timing both models in turn: {setting}", seconds * (len(settings) - i))
        timed = time_both(original, quantized, feeds, thread_count, batch_size, seconds)
        rows.append({"batch": batch_size, **timed})
    if runtime != "python":
        return Answer({**rows[0], "timings": rows, "footprints": None}, timing_views.timing_view)
    following = command_line("explain", quantized)
    progress("loading both models")
    footprints = {
        name: footprint(path, feeds, threads[0], batch[0])
        for name, path in (("float", original), ("quantized", quantized))
    }
    answer = {**rows[0], "timings": rows, "footprints": footprints, "next": following}
    return Answer(answer, timing_views.timing_view)


def explain(
    model: AnyModel,
    feeds: SampleSpec,
    config: QuantConfig,
    progress: Progress,
    threads: ThreadCount = 1,
    seconds: Seconds = 1.0,
    output: Page = None,
) -> Answer:
    """Show which kernels run a model on this CPU, whichever tool made it.

    For each: whether it computes in integers and why not, what it costs, and what quantmill would
    do with it, by the options of `quantize`.
    """
    from quant_core import judging
    from quant_core.search.checks import check_output

    if output is not None:
        check_output(model, output)
    progress("timing every kernel", seconds)
    found = judging.explain_model(model, config, feeds, threads=threads, seconds=seconds)
    explanation = found.to_dict()
    if output is not None:
        from flows.report.command_pages import write_explanation

        write_explanation(explanation, output)
        explanation["page"] = str(output)
    if not explanation["is_quantized"]:
        data = "SAMPLES.npz" if feeds.is_random else str(feeds.source)
        explanation["next"] = command_line("quantize", model, "--data", data)
    return Answer(explanation, timing_views.explanation_view)


def compare(
    original: Original,
    files: Files,
    samples: SampleSpec,
    accuracy: AccuracyOptions,
    progress: Progress,
    threads: ThreadCount = 1,
    seconds: Seconds = 3.0,
    output: Page = None,
) -> Answer:
    """Compare quantized files of one model, whichever tools made them.

    By size, accuracy, latency, load time and memory; all run in turns.
    """
    from quant_core.search.checks import check_output

    check_labels(accuracy, samples)
    if output is not None:
        check_output(original, output)
    rows = comparison(original, files, samples, accuracy, progress, threads, seconds)
    if output is not None:
        from flows.report.command_pages import write_comparison

        write_comparison(rows, output)
        rows["page"] = str(output)
    missed = any(row["verdict"] == "not_met" for row in rows["files"])
    return Answer(rows, timing_views.comparison_view, exit_code=int(missed))
