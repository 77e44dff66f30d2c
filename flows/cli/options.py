"""The options that several commands share, as tables: a row for each, which the help shows.

An option that is not typed is left out, so its default stands in one place: in the value's type.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flows.cli.option import Option
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
    ),
    "symmetric": Option(
        bool,
        "Weights without a zero point, or weight-only ones with one",
        None,
        "symmetric",
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
    "bias_correction": Option(bool, "Correct biases for the means that rounding shifts"),
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
    "optimize": Option(bool, "Rewrite the float model exactly first, where faster"),
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
    "force": Option(bool, "Make again also what is up to date"),
    "prefect": Option(
        Literal["own", "inherit"],
        "Start a Prefect server of its own, or use PREFECT_*",
        None,
        "own",
    ),
}
AUDITING = {name: option for name, option in RUNNING.items() if name != "force"}
FORMAT = Option(Literal["text", "json"], "text for people, json for programs", default="text")
