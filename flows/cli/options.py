"""The options that several commands share, as tables: a row for each, which the help shows.

An option that is not typed is left out, so its default stands in one place: in the value's type.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from flows.cli.option import Option
from flows.console.flags import flag
from quant_core.config import (
    FLOAT_STORAGE,
    METHODS,
    PRUNE,
    QAT,
    RUNTIMES,
    WEIGHT_METHOD_NAMES,
    Mode,
    QuantConfig,
)
from quant_core.metrics import METRICS
from quant_core.plan.targets import TARGETS

# Type of a field's default -> type of what is typed; a number without a fixed default is None.
_KINDS: dict[type, Any] = {tuple: list[str], dict: list[str], NoneType: float}


def _of_config(**options: Option) -> dict[str, Option]:
    """The options of these fields of QuantConfig, each with the type and default of its field."""
    default, found = QuantConfig(), {}
    for name, option in options.items():
        value = getattr(default, name)
        kind, shown = type(value), value
        if kind in _KINDS:  # the help says in words what an empty value means, if anything
            kind, shown = _KINDS[kind], option.default
        elif kind is bool:  # every switch of QuantConfig is on
            shown = flag(name).removeprefix("--")
        found[name] = replace(option, kind=kind, default=shown)
    return found


CONFIG = _of_config(
    bits=Option("Bits in which weights are stored; 4 in blocks", "8|4"),
    mode=Option(
        "How nodes compute: auto, static, dynamic or weight_only", "MODE", choices=tuple(Mode)
    ),
    method=Option(
        "How ranges of activations are chosen: auto, minmax, percentile, entropy or mse",
        "METHOD",
        choices=METHODS,
    ),
    percentile=Option("Share of the values inside a range, for --method percentile", "PERCENT"),
    per_channel=Option("A scale for each output channel of a weight, or one for all"),
    symmetric=Option("Weights without a zero point, or weight-only ones with one"),
    block_size=Option("How many 4-bit weights share a scale", "16|32|64|128"),
    weight_method=Option(
        "How weights are rounded: auto, rtn, mse or gptq", "METHOD", choices=WEIGHT_METHOD_NAMES
    ),
    bias_correction=Option("Correct biases for the means that rounding shifts"),
    exclude=Option("Nodes or weights of this name stay float; repeatable", "GLOB"),
    layer_bits=Option(
        "Nodes or weights of this name get 32, 16, 8 or 4 bits; repeatable", "GLOB=BITS"
    ),
    min_elements=Option("Weights with fewer elements stay float", "N"),
    target=Option(
        f"Where the file will run: auto (CPUs like this one), {', '.join(TARGETS)}",
        "NAME",
        choices=("auto", *TARGETS),
    ),
    runtime=Option(
        "How weight-only weights are written: folded (unpacked once, when loading) or qdq",
        "PATTERN",
        choices=RUNTIMES,
    ),
    float_storage=Option(
        "How weights that stay float are stored: float32 or float16", "TYPE", choices=FLOAT_STORAGE
    ),
    qat=Option(
        "What becomes of scales that training learned: respect or replace", "WHAT", choices=QAT
    ),
    optimize=Option("Rewrite the float model exactly first, where faster"),
    fix_shape=Option(
        "Fix open sizes of inputs, and what follows: batch=1,height=224; repeatable",
        "NAME=SIZE|INPUT:AXIS=SIZE",
    ),
    prune=Option("What is cut out of the model: none or zero-channels", "WHAT", choices=PRUNE),
    floor_db=Option(
        "Least SQNR of each output; exit 1 if one is lower", "DB", "12 in 8 bits, 8 in 4 bits"
    ),
    time_budget_s=Option(
        "When to end with the best found, from the start of the command",
        "SECONDS",
        "180 below 100 MB",
    ),
    provider=Option("Execution provider of calibration, such as cpu, cuda or openvino", "NAME"),
)
CODE = {"allow_code": Option("Folder from which metrics module:function may run", "DIR", kind=Path)}
ACCURACY = {
    "metric": Option(
        f"How accuracy is measured: {', '.join(METRICS)} or module:function",
        "METRIC",
        choices=METRICS,
    ),
    "max_drop": Option("Contract: exit 1 if the metric falls by more", "AMOUNT", kind=float),
    "min": Option("Contract: exit 1 if the metric is lower", "VALUE", kind=float),
    **CODE,
}
SAMPLES = {
    "data": Option("Samples: a .npy, a .npz, a folder of .npz files, or random", "SOURCE"),
    "labels": Option("Right answers, one for each sample: a .npy", "FILE"),
    "num_samples": Option("Take only so many of the samples", "N", kind=int),
    "shape": Option(
        "Shape of random samples: [INPUT=]1,3,224,224; repeatable", "SHAPE", kind=list[str]
    ),
}
FEEDS = {name: option for name, option in SAMPLES.items() if name != "labels"}
RUNNING = {
    "jobs": Option("How many workers on this host", "N", "as many as fit", kind=int),
    "scheduler": Option("Use the Dask cluster at tcp://HOST:8786", "ADDRESS"),
    "only": Option("Only models of this name; repeatable", "GLOB", kind=list[str]),
    "force": Option("Make again also what is up to date", kind=bool),
    "prefect": Option(
        "Start a Prefect server of its own, or use PREFECT_*",
        default="own",
        kind=Literal["own", "inherit"],
    ),
}
AUDITING = {name: option for name, option in RUNNING.items() if name != "force"}
FORMAT = Option("text for people, json for programs", default="text", kind=Literal["text", "json"])
