"""The commands of `quantmill` about many models. Each docstring here is the command's help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.checks import changed_options, check_labels
from flows.cli.command import Answer
from flows.cli.groups import AccuracyOptions
from flows.cli.next_commands import command_line
from flows.cli.options import CODE, RUNNING
from flows.cli.parameters import (
    ContinueOnError,
    CostsFile,
    DryRun,
    Layout,
    ManifestFile,
    ManifestOutput,
    MaxSlowdown,
    ModelFolder,
    Models,
    OutputDir,
    Page,
    Rebuild,
    Reports,
    RunId,
    SkipExisting,
)
from flows.console import model_views, run_views
from flows.console.flags import flag
from flows.manifest.outputs import FOLDER
from flows.regression import MAX_SLOWDOWN
from flows.runtime.run_options import RunOptions
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

if TYPE_CHECKING:
    from flows.manifest.jobs import Manifest

# Heavy imports stand inside the commands: `--help` must wait neither for onnx nor for Prefect.


def batch(
    models: Models,
    samples: SampleSpec,
    config: QuantConfig,
    accuracy: AccuracyOptions,
    running: RunOptions,
    as_json: bool,
    typed_options: Sequence[str],
    output_dir: OutputDir = None,
    layout: Layout = None,
    skip_existing: SkipExisting = None,
    continue_on_error: ContinueOnError = None,
    costs: CostsFile = None,
    dry_run: DryRun = False,
) -> int:
    """Quantize many models on all cores; what is finished survives whatever happens to the rest.

    A YAML or TOML manifest in place of the models is done as `quantmill config` does it.
    """
    from flows.manifest.read import check_manifest

    if manifest_name := next(filter(_names_a_manifest, models), None):
        _check_that_it_is_alone(manifest_name, models, typed_options)
        return _run_file(Path(manifest_name), accuracy.allow_code, running, as_json, dry_run)
    if accuracy.metric and not accuracy.contract:
        raise RequestError("alone is no contract", "--metric", "Add --max-drop or --min")
    check_labels(accuracy, samples)
    is_folder_or_glob = len(models) == 1 and not _names_a_model(models[0])
    if layout and not is_folder_or_glob:
        raise RequestError("takes one folder", "--layout", "Name the folder of one model")
    if output_dir is None:
        if not layout:
            raise RequestError("is missing", "--output-dir", "Say where to write: -o DIR")
        output_dir = str(_folder_beside(models[0], config.bits))
    values = {
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
        "calibration": _calibration_values(samples),
        "contract": accuracy.contract and accuracy.contract.to_dict(),
    }
    manifest = check_manifest(values, Path.cwd(), "command line")
    running = replace(running, allow_code=accuracy.allow_code)
    return _run_manifest(manifest, running, as_json, dry_run)


def _calibration_values(samples: SampleSpec) -> dict[str, Any]:
    """The samples as a manifest has them."""
    return {
        "data": samples.source,
        "labels": samples.labels and str(samples.labels),
        "num_samples": samples.count,
        "shape": samples.shape or {},
    }


def _folder_beside(model: str, bits: int) -> Path:
    """Where a folder's model is written by default; here if it lies in a store."""
    from flows.manifest.paths import absolute

    folder = absolute(Path.cwd(), model)
    beside = folder.parent if isinstance(folder, Path) else Path.cwd()
    return beside / f"{folder.name}_int{bits}"


def _names_a_manifest(text: str) -> bool:
    from flows.manifest.parse import SUFFIXES
    from tasks.locations import is_url

    is_file = not (is_url(text) or has_magic(text) or Path(text).is_dir())
    return is_file and Path(text).suffix.lower() in SUFFIXES


def _check_that_it_is_alone(
    manifest: str, models: Sequence[str], typed_options: Sequence[str]
) -> None:
    """Raises: RequestError for models beside a manifest, and for options that are keys of it."""
    if len(models) > 1:
        hint = "Name one manifest, or models without one"
        raise RequestError("is a manifest, which stands alone", manifest, hint)
    of_a_run = {"models", "dry_run", *RUNNING, *CODE}
    if others := [flag(name) for name in typed_options if name not in of_a_run]:
        hint = f"Write that in {manifest}, or name models in its place"
        raise RequestError("cannot stand beside a manifest", ", ".join(others), hint)


def _names_a_model(text: str) -> bool:
    """Whether this is one model, and no folder or glob of models."""
    from tasks.locations import Url, is_model, is_url

    if is_url(text):
        return is_model(Url(text)) and not has_magic(text)
    return Path(text).is_file()


def config(
    file: ManifestFile,
    allow_code: Path | None,
    running: RunOptions,
    as_json: bool,
    dry_run: DryRun = False,
) -> int:
    """Run the batch of a YAML or TOML manifest; the same as `python -m flows.batch FILE`."""
    return _run_file(file, allow_code, running, as_json, dry_run)


def init(
    folder: ModelFolder,
    output: ManifestOutput = None,
) -> Answer:
    """Write a commented manifest for a folder of models, with the data that lie beside them."""
    from flows.manifest.draft import draft_manifest

    path, models = draft_manifest(folder, output)
    rows = [model.to_dict(path.parent) for model in models]
    following = command_line("config", path, "--dry-run")
    answer = {"manifest": str(path), "models": rows, "next": following}
    return Answer(answer, model_views.draft_view)


def report(
    folder: Reports, run: RunId = None, output: Page = None, rebuild: Rebuild = False
) -> Answer:
    """Show the results of a batch: of its latest run, or of another one.

    They are read from the Parquet in the output folder. With -o they are written as an HTML page
    that opens offline.
    """
    from flows.reading import read_reports

    written: dict[str, Any] = {}
    if rebuild:
        if not (folder / FOLDER / "journal.jsonl").is_file():
            raise RequestError("holds no journal", str(folder), "Name a batch's output folder")
        from flows.batch.rebuild import rebuild as rebuild_reports

        files, skipped_lines = rebuild_reports(folder)
        written = {"rebuilt": [str(path) for path in files], "skipped_lines": skipped_lines}
    if output is not None:
        from flows.report.page import write_report

        write_report(folder, output, run)
        written["page"] = str(output)
    return Answer(read_reports(folder, run) | written, run_views.reports_view)


def audit(
    folder: Reports,
    allow_code: Path | None,
    auditing: RunOptions,
    as_json: bool,
    max_slowdown: MaxSlowdown = MAX_SLOWDOWN,
) -> int:
    """Judge and time again what a batch made: is it still there, as right and as fast?

    The same as `python -m flows.audit DIR`.
    """
    from flows.audit.run import audit_and_show

    auditing = replace(auditing, allow_code=allow_code)
    return audit_and_show(folder, auditing, max_slowdown=max_slowdown, as_json=as_json)


def _run_file(
    file: Path, allow_code: Path | None, running: RunOptions, as_json: bool, dry_run: bool
) -> int:
    """Make the models of a manifest in a file."""
    from flows.manifest.read import read_manifest

    running = replace(running, allow_code=allow_code)
    return _run_manifest(read_manifest(file), running, as_json, dry_run)


def _run_manifest(manifest: Manifest, running: RunOptions, as_json: bool, dry_run: bool) -> int:
    """Make the models of a manifest, or with `dry_run` only print their plans."""
    from flows.batch.run import run_and_show, show_plans

    show = show_plans if dry_run else run_and_show
    return show(manifest, running, as_json=as_json)
