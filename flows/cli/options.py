"""Groups of options that several commands share, and the value that each group builds.

An option that is not typed is left out, so its default stands in one place: in the value's type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.cli.option import Group, Option, flag
from flows.runtime.prefect_api import Prefect
from flows.runtime.run_options import RunOptions
from quant_core.config import (
    FLOAT_STORAGE,
    METHODS,
    PRUNE,
    QAT,
    RUNTIMES,
    WEIGHT_METHOD_NAMES,
    Contract,
    Mode,
    QuantConfig,
    check_metric,
)
from quant_core.data.spec import RANDOM, SampleSpec
from quant_core.errors import RequestError
from quant_core.metrics import METRICS, find_metric
from quant_core.plan.targets import TARGETS, find_target


@dataclass(frozen=True, slots=True)
class AccuracyOptions:
    """How accuracy is measured, and what is promised.

    contract    None without `--max-drop` and `--min`
    allow_code  the folder from which a metric `module:function` may run; None: none may
    """

    metric: str | None = None
    contract: Contract | None = None
    allow_code: Path | None = None


def check_labels(accuracy: AccuracyOptions, samples: SampleSpec) -> None:
    """Raises: RequestError if the metric needs labels, and the samples have none."""
    metric = accuracy.contract.metric if accuracy.contract else accuracy.metric
    if metric is not None and find_metric(metric).needs_labels and samples.labels is None:
        hint = "Give --labels, or take agreement or cosine"
        raise RequestError("needs labels", f"--metric {metric}", hint)


def changed_options(config: QuantConfig) -> dict[str, Any]:
    """The options that differ from the defaults, as a manifest has them."""
    default = QuantConfig().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != default[key]}


def first_measured_option(config: QuantConfig) -> str | None:
    """The first option that was typed of those that do nothing without samples: how ranges are
    chosen, and GPTQ; None if none was.
    """
    changed = changed_options(config)
    measured = {"method", "percentile"} | (
        {"weight_method"} if config.weight_method == "gptq" else set()
    )
    return next((flag_of(key) for key in changed if key in measured), None)


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
    where = flag_of(key) + (f" {rest}" if rest else "")
    return RequestError(error.problem, where, error.hint)


def flag_of(key: str) -> str:
    """The option of a key of QuantConfig, as it is typed: `time_budget_s` is `--time-budget`."""
    option = CONFIG.get(key)
    return flag(key) if option is None or option.flags is None else option.flags.split("/")[0]


_DEFAULT = QuantConfig()
CONFIG = {
    "bits": Option(int, "Bits in which weights are stored; 4 in blocks", "8|4", _DEFAULT.bits),
    "mode": Option(
        str,
        "How nodes compute: auto, static, dynamic or weight_only",
        "MODE",
        _DEFAULT.mode,
        choices=tuple(Mode),
    ),
    "method": Option(
        str,
        "How ranges of activations are chosen: auto, minmax, percentile, entropy or mse",
        "METHOD",
        _DEFAULT.method,
        choices=METHODS,
    ),
    "percentile": Option(
        float,
        "Share of the values inside a range, for --method percentile",
        "PERCENT",
        _DEFAULT.percentile,
    ),
    "per_channel": Option(
        bool,
        "A scale for each output channel of a weight, or one for all",
        None,
        "per channel",
        "--per-channel/--per-tensor",
    ),
    "symmetric": Option(
        bool,
        "Weights without a zero point, or weight-only ones with one",
        None,
        "symmetric",
        "--symmetric/--asymmetric",
    ),
    "block_size": Option(
        int, "How many 4-bit weights share a scale", "16|32|64|128", _DEFAULT.block_size
    ),
    "weight_method": Option(
        str,
        "How weights are rounded: auto, rtn, mse or gptq",
        "METHOD",
        _DEFAULT.weight_method,
        choices=WEIGHT_METHOD_NAMES,
    ),
    "bias_correction": Option(
        bool,
        "Correct biases for the means that rounding shifts",
        flags="--bias-correction/--no-bias-correction",
    ),
    "exclude": Option(list[str], "Nodes or weights of this name stay float; repeatable", "GLOB"),
    "layer_bits": Option(
        list[str], "Nodes or weights of this name get 32, 16, 8 or 4 bits; repeatable", "GLOB=BITS"
    ),
    "min_elements": Option(
        int, "Weights with fewer elements stay float", "N", _DEFAULT.min_elements
    ),
    "target": Option(
        str,
        f"Where the file will run: auto (CPUs like this one), {', '.join(TARGETS)}",
        "NAME",
        _DEFAULT.target,
        choices=("auto", *TARGETS),
    ),
    "runtime": Option(
        str,
        "How weight-only weights are written: folded (unpacked once, when loading) or qdq",
        "PATTERN",
        _DEFAULT.runtime,
        choices=RUNTIMES,
    ),
    "float_storage": Option(
        str,
        "How weights that stay float are stored: float32 or float16",
        "TYPE",
        _DEFAULT.float_storage,
        choices=FLOAT_STORAGE,
    ),
    "qat": Option(
        str,
        "What becomes of scales that training learned: respect or replace",
        "WHAT",
        _DEFAULT.qat,
        choices=QAT,
    ),
    "optimize": Option(
        bool,
        "Rewrite the float model exactly first, where faster",
        flags="--optimize/--no-optimize",
    ),
    "fix_shape": Option(
        list[str],
        "Fix open sizes of inputs, and what follows: batch=1,height=224; repeatable",
        "NAME=SIZE|INPUT:AXIS=SIZE",
    ),
    "prune": Option(
        str,
        "What is cut out of the model: none or zero-channels",
        "WHAT",
        _DEFAULT.prune,
        choices=PRUNE,
    ),
    "floor_db": Option(
        float,
        "Least SQNR of each output; exit 1 if one is lower",
        "DB",
        "12 in 8 bits, 8 in 4 bits",
    ),
    "time_budget_s": Option(
        float,
        "When to end with the best found, from the start of the command",
        "SECONDS",
        "180 below 100 MB",
        "--time-budget",
    ),
    "provider": Option(
        str,
        "Execution provider of calibration, such as cpu, cuda or openvino",
        "NAME",
        _DEFAULT.provider,
    ),
}
CODE = {"allow_code": Option(Path, "Folder from which metrics module:function may run", "DIR")}
ACCURACY = {
    "metric": Option(
        str,
        f"How accuracy is measured: {', '.join(METRICS)} or module:function",
        "METRIC",
        choices=METRICS,
    ),
    "max_drop": Option(float, "Contract: exit 1 if the metric falls by more", "AMOUNT"),
    "min": Option(float, "Contract: exit 1 if the metric is lower", "VALUE"),
    **CODE,
}
SAMPLES = {
    "data": Option(str, "Samples: a .npy, a .npz, a folder of .npz files, or random", "SOURCE"),
    "labels": Option(str, "Right answers, one for each sample: a .npy", "FILE"),
    "num_samples": Option(int, "Take only so many of the samples", "N"),
    "shape": Option(list[str], "Shape of random samples: [INPUT=]1,3,224,224; repeatable", "SHAPE"),
}
FEEDS = {name: option for name, option in SAMPLES.items() if name != "labels"}
RUNNING = {
    "jobs": Option(int, "How many workers on this host", "N", "as many as fit"),
    "scheduler": Option(str, "Use the Dask cluster at tcp://HOST:8786", "ADDRESS"),
    "only": Option(list[str], "Only models of this name; repeatable", "GLOB"),
    "force": Option(bool, "Make again also what is up to date", flags="--force"),
    "prefect": Option(
        Literal["own", "inherit"],
        "Start a Prefect server of its own, or use PREFECT_*",
        None,
        "own",
    ),
}
GROUPS = {
    "config": Group("Quantization", CONFIG, _build_config),
    "accuracy": Group("Accuracy", ACCURACY, _build_accuracy),
    "samples": Group("Samples", SAMPLES, _build_samples),
    "feeds": Group("Samples", FEEDS, _build_samples),
    "calibration": Group("Samples", SAMPLES, _build_calibration),
    "allow_code": Group("Accuracy", CODE, lambda typed: typed.get("allow_code")),
    "running": Group("Running", RUNNING, _build_running),
}
FORMAT = Option(Literal["text", "json"], "text for people, json for programs", default="text")
