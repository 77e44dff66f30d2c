"""Groups of options that several commands share, and the value that each group builds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.cli.option import Group
from flows.cli.options import ACCURACY, AUDITING, CODE, CONFIG, FEEDS, RUNNING, SAMPLES
from flows.console.flags import flag
from flows.runtime.prefect_api import Prefect
from flows.runtime.run_options import RunOptions
from quant_core.config import Contract, QuantConfig, check_metric
from quant_core.data.spec import RANDOM, SampleSpec
from quant_core.errors import RequestError
from quant_core.plan.targets import find_target


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    """How accuracy is measured, and what is promised.

    contract    None without `--max-drop` and `--min`
    allow_code  the folder from which a metric `module:function` may run; None: none may
    """

    metric: str | None = None
    contract: Contract | None = None
    allow_code: Path | None = None


def _build_config(typed: Mapping[str, Any]) -> QuantConfig:
    try:
        layer_bits = dict(_parse_layer_bits(text) for text in typed.get("layer_bits", ()))
        fix_shape = dict(_parse_sizes(typed.get("fix_shape", ())))
        mappings = {"layer_bits": layer_bits, "fix_shape": fix_shape}
        config = QuantConfig.from_dict({**typed, **mappings})
        find_target(config.target)
        return config
    except RequestError as error:
        raise _at_option(error) from None


def _build_accuracy(typed: Mapping[str, Any]) -> AccuracyOptions:
    metric = typed.get("metric")
    promised = {key: value for key, value in typed.items() if key != "allow_code"}
    try:
        if metric is not None:
            check_metric(metric)
        contract = Contract.from_dict(promised) if promised.keys() - {"metric"} else None
        return AccuracyOptions(metric, contract, typed.get("allow_code"))
    except RequestError as error:
        raise _at_option(error) from None


def _build_samples(typed: Mapping[str, Any]) -> SampleSpec:
    """The samples that were typed; random ones without `--data`."""
    _check_at_least_one("num_samples", typed)
    shapes = dict(_parse_shape(text) for text in typed.get("shape", ()))
    if "" in shapes and len(shapes) > 1:
        hint = "INPUT=1,3,224,224 for each of several inputs"
        raise RequestError("names no input", "--shape", hint)
    return SampleSpec(
        source=typed.get("data", RANDOM),
        labels=typed.get("labels"),
        count=typed.get("num_samples"),
        shape=shapes.get("", shapes) or None,
    )


def _build_calibration(typed: Mapping[str, Any]) -> SampleSpec | None:
    """The samples that were typed; None without `--data`."""
    if "data" in typed:
        return _build_samples(typed)
    if typed:
        option = flag(next(iter(typed)))
        raise RequestError("means nothing without samples", option, "Give --data")
    return None


def _build_running(typed: Mapping[str, Any]) -> RunOptions:
    _check_at_least_one("jobs", typed)
    prefect = Prefect(typed.get("prefect", Prefect.OWN))
    return RunOptions(**{**typed, "prefect": prefect})


def _check_at_least_one(name: str, typed: Mapping[str, Any]) -> None:
    if typed.get(name, 1) < 1:
        raise RequestError(f"is {typed[name]}", flag(name), "1 or more")


def _parse_layer_bits(text: str) -> tuple[str, int]:
    glob, _, bits = text.rpartition("=")
    if not glob or not bits.isdecimal():
        raise RequestError(f"is {text!r}", "layer_bits", "GLOB=BITS, say '*/head/*=32'")
    return glob, int(bits)


def _parse_sizes(texts: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Names of open sizes, or INPUT:AXIS, and what each is fixed to."""
    for part in [part for text in texts for part in text.split(",")]:
        name, _, size = part.strip().rpartition("=")
        if not name or not size.isdecimal():
            hint = "NAME=SIZE or INPUT:AXIS=SIZE, say batch=1,height=224"
            raise RequestError(f"is {part!r}", "fix_shape", hint)
        yield name, int(size)


def _parse_shape(text: str) -> tuple[str, list[int]]:
    """The input's name, empty if the text names none, and the sizes."""
    name, _, sizes = text.rpartition("=")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes.split(",")):
        hint = "INPUT=1,3,224,224, or without INPUT= if there is only one"
        raise RequestError(f"is {text!r}", "--shape", hint)
    return name, [int(size) for size in sizes.split(",")]


def _at_option(error: RequestError) -> RequestError:
    """The same error, with the option that was typed as its place."""
    key, _, rest = error.where.removeprefix("contract.").partition(".")
    where = flag(key) + (f" {rest}" if rest else "")
    return RequestError(error.problem, where, error.hint)


GROUPS = {
    "config": Group("Quantization", CONFIG, _build_config),
    "accuracy": Group("Accuracy", ACCURACY, _build_accuracy),
    "samples": Group("Samples", SAMPLES, _build_samples),
    "feeds": Group("Samples", FEEDS, _build_samples),
    "calibration": Group("Samples", SAMPLES, _build_calibration),
    "allow_code": Group("Accuracy", CODE, lambda typed: typed.get("allow_code")),
    "running": Group("Running", RUNNING, _build_running),
    "auditing": Group("Running", AUDITING, _build_running),
}
