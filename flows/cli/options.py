"""How what is typed becomes a config, a contract and samples, and how an answer becomes text or JSON."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.console import render
from quant_core.config import Contract, QuantConfig, check_metric
from quant_core.data.spec import RANDOM, SampleSpec
from quant_core.errors import QuantError, RequestError
from quant_core.metrics import METRICS
from quant_core.plan.targets import find_target

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found out: JSON values, how a person sees them, and the exit code."""

    data: Any
    view: Callable[[Any], RenderableType]
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    """What is measured, and what was promised about it (None without `--max-drop` and `--min`)."""

    metric: str | None = None
    contract: Contract | None = None


Command = Callable[..., Answer | int]


def register(app: typer.Typer) -> Callable[[Command], Command]:
    """A decorator that makes a function a command of `app`.

    1. A parameter named as one of GROUPS becomes that group's options, and the function gets what they build.
    2. A parameter named `progress` is called with what is being done, for who is waiting; `as_json` is the format.
    3. Every command has `--format`; the answer is printed, or the error explained, in that; the exit code is theirs.
       A function that has already told everything answers with its exit code alone.
    """

    def decorate(function: Command) -> Command:
        wanted = inspect.signature(function, eval_str=True).parameters
        own = [
            p
            for p in wanted.values()
            if p.name not in GROUPS and p.name not in ("progress", "as_json")
        ]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own]
        for group in filter(GROUPS.__contains__, wanted):
            parameters += [
                _parameter(name, kind, None) for name, kind in GROUPS[group].options.items()
            ]
        parameters.append(_parameter("format", FORMAT, "text"))

        def run(**given: Any) -> None:
            raise typer.Exit(_print_answer(function, given, as_json=given.pop("format") == "json"))

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        app.command(function.__name__)(run)
        return function

    return decorate


def said_keys(config: QuantConfig) -> dict[str, Any]:
    """What differs from the defaults: a manifest then has its own word on the rest."""
    default = QuantConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != default[key]}


def _print_answer(function: Command, given: dict[str, Any], as_json: bool) -> int:
    wanted = inspect.signature(function).parameters
    where = str(next((value for value in given.values() if isinstance(value, Path)), ""))
    try:
        for group in filter(GROUPS.__contains__, wanted):
            values = {name: given.pop(name) for name in GROUPS[group].options}
            given[group] = GROUPS[group].build(
                {name: v for name, v in values.items() if v not in (None, [], ())}
            )
        if "as_json" in wanted:
            given["as_json"] = as_json
        if "progress" not in wanted:
            answer = function(**given)
        else:
            with render.working(quiet=as_json) as progress:
                answer = function(**given, progress=progress)
    except QuantError as error:
        render.explain(
            error if error.where else type(error)(error.problem, where, error.hint), as_json
        )
        return error.exit_code
    except Exception as error:
        if os.environ.get("QUANTMILL_DEBUG"):
            raise
        hint = "Please report it; QUANTMILL_DEBUG=1 shows the traceback"
        render.explain(
            QuantError(f"unexpected {type(error).__name__}: {error}", where, hint), as_json
        )
        return 1
    if isinstance(answer, int):
        return answer
    render.answer(answer.data, None if as_json else answer.view)
    return answer.exit_code


def _read_config(said: Mapping[str, Any]) -> QuantConfig:
    try:
        layers = dict(_glob_bits(text) for text in said.get("layer_bits", ()))
        config = QuantConfig.from_dict({**said, "layer_bits": layers})
        find_target(config.target)
        return config
    except RequestError as error:
        raise _at_option(error) from None


def _read_accuracy(said: Mapping[str, Any]) -> AccuracyOptions:
    promised = said.keys() & {"max_drop", "min"}
    metric = said.get("metric")
    try:
        if metric is not None:
            check_metric(metric)
        return AccuracyOptions(metric, Contract.from_dict(said) if promised else None)
    except RequestError as error:
        raise _at_option(error) from None


def _read_samples(said: Mapping[str, Any]) -> SampleSpec:
    """The samples that were typed; random ones without `--data`."""
    if said.get("num_samples", 1) < 1:
        raise RequestError(f"is {said['num_samples']}", "--num-samples", "1 or more")
    shapes = dict(_input_shape(text) for text in said.get("shape", ()))
    if "" in shapes and len(shapes) > 1:
        raise RequestError(
            "names no input", "--shape", "INPUT=1,3,224,224 for each of several inputs"
        )
    return SampleSpec(
        source=said.get("data", RANDOM),
        labels=said.get("labels"),
        count=said.get("num_samples"),
        shape=shapes.get("", shapes) or None,
    )


def _read_calibration(said: Mapping[str, Any]) -> SampleSpec | None:
    """The samples that were typed; None without `--data`."""
    if "data" in said:
        return _read_samples(said)
    if said:
        option = "--" + next(iter(said)).replace("_", "-")
        raise RequestError("means nothing without samples", option, "Give --data")
    return None


def _read_running(said: Mapping[str, Any]) -> dict[str, Any]:
    if said.get("jobs", 1) < 1:
        raise RequestError(f"is {said['jobs']}", "--jobs", "1 or more")
    return dict(said)


def _glob_bits(text: str) -> tuple[str, int]:
    glob, _, bits = text.rpartition("=")
    if not glob or not bits.isdecimal():
        raise RequestError(f"is {text!r}", "layer_bits", "GLOB=BITS, say '*/head/*=32'")
    return glob, int(bits)


def _input_shape(text: str) -> tuple[str, list[int]]:
    name, _, sizes = text.rpartition("=")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes.split(",")):
        raise RequestError(
            f"is {text!r}", "--shape", "INPUT=1,3,224,224, or without INPUT= if there is only one"
        )
    return name, [int(size) for size in sizes.split(",")]


def _at_option(error: RequestError) -> RequestError:
    """The same error, but where it happened is the option that was typed."""
    key, _, rest = error.where.removeprefix("contract.").partition(".")
    where = f"--{key.replace('_', '-')}" + (f" {rest}" if rest else "")
    return RequestError(error.problem, where, error.hint)


def _parameter(name: str, kind: Any, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _option(
    kind: Any,
    flags: str,
    help: str,
    metavar: str | None = None,
    default: str | None = None,
    panel: str | None = None,
) -> Any:
    option = typer.Option(
        flags, help=help, metavar=metavar, show_default=default or False, rich_help_panel=panel
    )
    return Annotated[kind, option]


@dataclass(frozen=True, slots=True)
class Group:
    """Options that build one value together; the function gets only those that were given."""

    options: Mapping[str, Any]
    build: Callable[[Mapping[str, Any]], Any]


TEXT, INT, FLOAT, BOOL, PATH, TEXTS = (
    str | None,
    int | None,
    float | None,
    bool | None,
    Path | None,
    list[str] | None,
)

PANELS = ("Quantization", "Accuracy", "Samples", "Running")
_config, _accuracy, _samples, _running = (partial(_option, panel=panel) for panel in PANELS)
CONFIG = {
    "bits": _config(
        INT, "--bits", "Bits of a stored weight; 4 means in blocks", "8|4", default="8"
    ),
    "mode": _config(TEXT, "--mode", "auto, static, dynamic or weight_only", "MODE", default="auto"),
    "method": _config(
        TEXT, "--method", "Ranges: auto, minmax, percentile, entropy, mse", "METHOD", default="auto"
    ),
    "percentile": _config(FLOAT, "--percentile", "Of --method percentile", "P", default="99.99"),
    "per_channel": _config(
        BOOL, "--per-channel/--per-tensor", "Scales of a weight", default="per channel"
    ),
    "symmetric": _config(BOOL, "--symmetric/--asymmetric", "Grid of a weight", default="symmetric"),
    "block_size": _config(
        INT, "--block-size", "4-bit weights that share a scale", "16|32|64|128", default="32"
    ),
    "weight_method": _config(
        TEXT, "--weight-method", "Rounding: auto, rtn, mse, gptq", "METHOD", default="auto"
    ),
    "bias_correction": _config(
        BOOL, "--bias-correction/--no-bias-correction", "Give back the means that rounding took"
    ),
    "exclude": _config(TEXTS, "--exclude", "Nodes or weights that stay float; repeatable", "GLOB"),
    "layer_bits": _config(
        TEXTS, "--layer-bits", "32, 16, 8 or 4 bits for these; repeatable", "GLOB=BITS"
    ),
    "min_elements": _config(INT, "--min-elements", "Smaller weights stay float", "N", default="0"),
    "target": _config(
        TEXT,
        "--target",
        "auto (this CPU), x86-avx2, x86-vnni, arm64, portable",
        "CPU",
        default="auto",
    ),
    "runtime": _config(
        TEXT, "--runtime", "Weight-only pattern: folded or qdq", "PATTERN", default="folded"
    ),
    "float_storage": _config(
        TEXT, "--float-storage", "Of what stays float: float32, float16", "TYPE", default="float32"
    ),
}
ACCURACY = {
    "metric": _accuracy(TEXT, "--metric", f"{', '.join(METRICS)} or module:function", "METRIC"),
    "max_drop": _accuracy(FLOAT, "--max-drop", "Exit 1 if the metric falls by more", "D"),
    "min": _accuracy(FLOAT, "--min", "Exit 1 if the metric is lower", "V"),
}
SAMPLES = {
    "data": _samples(TEXT, "--data", "Samples: .npy, .npz, a folder of .npz, or random", "D"),
    "labels": _samples(PATH, "--labels", "Right answers, one per sample (.npy)", "L"),
    "num_samples": _samples(INT, "--num-samples", "Use only so many samples", "N"),
    "shape": _samples(
        TEXTS, "--shape", "Of random samples, [INPUT=]1,3,224,224; repeatable", "SHAPE"
    ),
}
RUNNING = {
    "jobs": _running(INT, "--jobs", "Workers on this host", "N", default="what fits"),
    "scheduler": _running(TEXT, "--scheduler", "Use this Dask cluster, tcp://host:8786", "ADDRESS"),
    "only": _running(TEXTS, "--only", "Models of that name; repeatable", "GLOB"),
    "force": _running(BOOL, "--force", "Make again what is up to date"),
}
GROUPS = {
    "config": Group(CONFIG, _read_config),
    "accuracy": Group(ACCURACY, _read_accuracy),
    "samples": Group(SAMPLES, _read_samples),
    "calibration": Group(SAMPLES, _read_calibration),
    "running": Group(RUNNING, _read_running),
}
FORMAT = _option(Literal["text", "json"], "--format", "For people or for programs", default="text")
