"""What the commands of `quantmill` answer about one model, as JSON values with the view that draws
them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.cli.checks import changed_options, check_labels, refuse_beside
from flows.cli.command import Answer
from flows.cli.groups import AccuracyOptions
from flows.cli.next_commands import after_quantizing, command_line
from flows.cli.timings import footprint, timer_for
from flows.console import model_views, result_views
from flows.console.flags import flag
from flows.runtime.process import importing
from quant_core.config import QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.deadline import Progress
from quant_core.errors import DataError, ModelError, RequestError, reason_of

if TYPE_CHECKING:
    from quant_core.plan.types import QuantPlan


def plan_answer(model: Path, config: QuantConfig, calibration: SampleSpec | None) -> Answer:
    """The plan of a model, which is not followed."""
    from quant_core import api

    plan = api.plan_model(model, config, calibration)
    return Answer(plan.to_dict(), model_views.plan_view)


def quantize_answer(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    accuracy: AccuracyOptions,
    progress: Progress,
    costs: Path | None,
    plan: QuantPlan | None,
    pareto: bool,
) -> Answer:
    """Quantize a model and time it; compare it with the original if a metric, contract or labels
    were given.
    """
    with importing():
        from quant_core import api
    gc.freeze()  # what was imported stays: a search need not look through it for garbage

    began_at = time.monotonic()
    if calibration is not None:
        check_labels(accuracy, calibration)
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
    result["is_drawn"] = calibration is None or calibration.is_random
    if plan is None and _is_late(config, result["float_size_bytes"], began_at):
        result |= {"timing": None, "not_timed": "the time budget is over"}
    else:
        result |= _timed(model, output, calibration or SampleSpec(), result["target"], progress)
    if calibration and (accuracy.metric or accuracy.contract or calibration.labels):
        progress("comparing it with the original")
        result |= validation(model, output, calibration, accuracy, progress)
        if result["shortfall"]:
            result |= {"verdict": "not_met", "reason": result["shortfall"]}
    is_missed = result["verdict"] == "not_met"
    result["next"] = after_quantizing(model, output, calibration, is_missed)
    view = result_views.pareto_view if pareto else result_views.quantization_view
    return Answer(result, view, exit_code=int(is_missed))


def _timed(
    original: Path, quantized: Path, samples: SampleSpec, target: str, progress: Progress
) -> dict[str, Any]:
    """The `timing` of both models; else why they are `not_timed`, "" if nothing here runs them."""
    time_both = timer_for(target)
    if time_both is None:
        return {"timing": None, "not_timed": ""}
    progress("timing both models in turn")
    try:
        return {"timing": time_both(original, quantized, samples), "not_timed": ""}
    except (DataError, ModelError, RequestError) as error:
        # the model does not run on random samples, or not in the runtime that times it
        return {"timing": None, "not_timed": str(error)}


def _is_late(config: QuantConfig, size_bytes: int, began_at: float) -> bool:
    """Whether a search that began then has taken all of its time budget but what timing needs."""
    from quant_core.search.job import deadline_of
    from quant_core.search.policy import POLICY

    spent_s = POLICY.start_s + time.monotonic() - began_at
    return deadline_of(size_bytes, config, spent_s).is_over


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
    from quant_core.model.files import bytes_on_disk
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
        ruling = asdict(judge(row.fidelity, contract))
        rows.append(row.to_dict() | ruling | footprint(path, samples, threads, 1))
    size_bytes = bytes_on_disk(original)
    first = {"file": str(original), "size_bytes": size_bytes}
    answer = {"original": first | footprint(original, samples, threads, 1), "files": rows}
    return answer | others | {"is_drawn": samples.is_random}


def optimize_answer(
    model: Path,
    output: Path,
    config: QuantConfig,
    calibration: SampleSpec | None,
    costs: Path | None,
) -> Answer:
    """Rewrite a float model exactly, without quantizing it."""
    from quant_core import api

    others = [flag(key) for key in changed_options(config) if key != "fix_shape"]
    refuse_beside("--optimize-only", dict.fromkeys(others, True))
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
    """How right a quantized model is, and whether it meets the contract: `Validation.to_dict`, and
    whether the samples were drawn.
    """
    from quant_core import judging

    found = judging.validate_model(
        original,
        quantized,
        samples,
        metric=accuracy.metric,
        contract=accuracy.contract,
        detailed=detailed,
        allow_code=accuracy.allow_code,
        provider=provider,
        progress=progress,
    )
    return found.to_dict() | {"is_drawn": samples.is_random}


def read_plan(path: Path) -> QuantPlan:
    """The plan of a file. Raises: RequestError if it holds none, or cannot be read."""
    from quant_core.plan.types import WRITE_ONE, QuantPlan

    try:
        return QuantPlan.from_json(path.read_text(encoding="utf-8"))
    except RequestError as error:
        key = "" if error.where == "plan" else f"{error.where}: "
        problem = f"is not a plan: {key}{error.problem}"
        raise RequestError(problem, str(path), error.hint or WRITE_ONE) from error
    except UnicodeDecodeError as error:
        raise RequestError("is not a plan, but no text at all", str(path), WRITE_ONE) from error
    except OSError as error:
        raise RequestError(f"cannot be read: {reason_of(error)}", str(path), WRITE_ONE) from error
