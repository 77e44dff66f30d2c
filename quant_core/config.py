"""The settings of a quantization and its contract: valid once built, unknown keys are errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from quant_core.errors import RequestError
from quant_core.fields import check_fields, known_keys, one_of
from quant_core.metrics import METRICS, custom_metric_in, find_metric

METHODS = ("auto", "minmax", "percentile", "entropy", "mse")
WEIGHT_METHOD_NAMES = ("auto", "rtn", "mse", "gptq")
RUNTIMES = ("folded", "qdq")
BITS = (8, 4)
LAYER_BITS = (32, 16, 8, 4)
QAT = ("respect", "replace")
PRUNE = ("none", "zero-channels")
FLOAT_STORAGE = ("float32", "float16")
# Bits of a weight -> SQNR in dB below which an output is broken: at 12 dB the noise is a quarter of
# the signal's amplitude.
FLOOR_DB = {8: 12.0, 4: 8.0}


class Mode(StrEnum):
    """How nodes may compute; `QuantConfig` says what each asks for."""

    AUTO = "auto"
    STATIC = "static"
    DYNAMIC = "dynamic"
    WEIGHT_ONLY = "weight_only"


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """How models are quantized. The default of every field serves most models best.

    bits           bits of a stored weight; 4 means blocks of `block_size` with one scale each
    mode           auto measures which computation of each node is fastest while the outputs stay
                   close to float's; static, dynamic and weight_only use that computation for every
                   node that supports it
    method         how the range of an activation is chosen; auto chooses a method per tensor, and
                   percentile uses `percentile`
    symmetric      whether weights have zero point 0; only weight-only weights may be asymmetric
    exclude        globs over names of nodes and weights that stay float
    min_elements   weights with fewer elements stay float
    layer_bits     glob over names of nodes and weights -> 32, 16, 8 or 4 bits; 32 and 16 compute
                   in float; the last glob that matches wins
    runtime        pattern of weight-only weights: folded is for onnxruntime, which makes the
                   weights float when it loads the model; qdq runs in any runtime
    float_storage  type of float weights in the file: float32, or float16 where their values fit
    qat            of a model from quantization-aware training: respect the scales it learned, or
                   replace them, and quantize its float weights as those of any other model
    optimize       whether the float model is rewritten exactly first, where that makes it faster
    fix_shape      name of an open size of the inputs, or INPUT:AXIS -> the size that it always has:
                   what follows from it is computed once, and the file takes no other
    prune          what is cut out of the float model: none, or zero-channels, channels that are the
                   same number everywhere or that nothing reads
    floor_db       least SQNR of each output of the finished file; None: FLOOR_DB of the bits
    provider       execution provider of onnxruntime that runs the float model on the calibration
                   samples, such as cuda; the CPU where that one is not there, and a note says so
    time_budget_s  seconds after which all work ends with the best found; None: by the model's size

    Raises: RequestError for a wrong value.
    """

    bits: int = 8
    mode: str = "auto"
    method: str = "auto"
    percentile: float = 99.99
    per_channel: bool = True
    symmetric: bool = True
    block_size: int = 32
    weight_method: str = "auto"
    bias_correction: bool = True
    exclude: tuple[str, ...] = ()
    min_elements: int = 0
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    target: str = "auto"
    runtime: str = "folded"
    float_storage: str = "float32"
    qat: str = "respect"
    optimize: bool = True
    fix_shape: Mapping[str, int] = field(default_factory=dict)
    prune: str = "none"
    floor_db: float | None = None
    time_budget_s: float | None = None
    provider: str = "cpu"

    def __post_init__(self) -> None:
        check_fields(self)
        one_of("bits", self.bits, BITS)
        one_of("mode", self.mode, tuple(Mode))
        one_of("method", self.method, METHODS)
        one_of("weight_method", self.weight_method, WEIGHT_METHOD_NAMES)
        one_of("runtime", self.runtime, RUNTIMES)
        one_of("float_storage", self.float_storage, FLOAT_STORAGE)
        one_of("qat", self.qat, QAT)
        one_of("prune", self.prune, PRUNE)
        for glob, bits in self.layer_bits.items():
            one_of(f"layer_bits.{glob}", bits, LAYER_BITS)
        for name, size in self.fix_shape.items():
            if size < 1:
                raise RequestError(f"is {size}", f"fix_shape.{name}", "A size is 1 or more")
        if not 50 < self.percentile <= 100:
            raise RequestError(
                f"is {self.percentile}", "percentile", "Above 50 and at most 100, say 99.99"
            )
        one_of("block_size", self.block_size, (16, 32, 64, 128))
        if self.min_elements < 0:
            raise RequestError(f"is {self.min_elements}", "min_elements", "0 or more")
        if self.floor_db is not None and not 0 <= self.floor_db <= 100:
            raise RequestError(f"is {self.floor_db}", "floor_db", "From 0 to 100 dB")
        if self.time_budget_s is not None and not 0 < self.time_budget_s < math.inf:
            raise RequestError(f"is {self.time_budget_s}", "time_budget_s", "Seconds above 0")

    @property
    def least_db(self) -> float:
        """The least SQNR of each output of the finished file."""
        return float(FLOOR_DB[self.bits] if self.floor_db is None else self.floor_db)

    @property
    def floor(self) -> Contract:
        """The contract that every finished file must satisfy: no output is worse than the floor."""
        return Contract("worst_sqnr", min=self.least_db)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """The config with these keys set.

        Raises: RequestError for an unknown key or a wrong value.
        """
        return replace(cls(), **known_keys(cls, values))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the config back."""
        mappings = {"layer_bits": dict(self.layer_bits), "fix_shape": dict(self.fix_shape)}
        return asdict(self) | {"exclude": list(self.exclude)} | mappings


@dataclass(frozen=True, slots=True)
class Contract:
    """How much accuracy a model may lose, and what it must gain for that.

    metric          top1 (share of labels predicted), agreement (share of decisions equal to
                    float's), cosine, sqnr (dB), or `module:function` of the user's own
    max_drop        upper bound of float value - quantized value; not for agreement and sqnr, which
                    have no float value
    min             lower bound of the quantized value
    min_speedup     lower bound of float latency / quantized latency
    max_size_ratio  upper bound of quantized bytes / float bytes

    Raises: RequestError for a wrong value, for a `min` that no model can reach, or without
    `max_drop` and `min`.
    """

    metric: str = "top1"
    max_drop: float | None = None
    min: float | None = None
    min_speedup: float | None = None
    max_size_ratio: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_metric(self.metric)
        if self.max_drop is None and self.min is None:
            raise RequestError("lacks a bound", "contract", "Set max_drop or min")
        if self.max_drop is not None and find_metric(self.metric).of_float is None:
            raise RequestError(
                f"{self.metric} has no value for float itself", "contract.max_drop", "Set min"
            )
        most = find_metric(self.metric).most
        if self.min is not None and self.min > most:
            problem = f"is {self.min:g}, but {self.metric} is never above {most:g}"
            raise RequestError(problem, "contract.min", "Give a share: 0.98 is 98 %")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Contract:
        """The contract with these keys.

        Raises: RequestError for an unknown key or a wrong value.
        """
        return cls(**known_keys(cls, values))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_metric(name: str) -> None:
    """Raises: RequestError unless `name` is a metric of the table or a `module:function`."""
    if custom_metric_in(name) is None:
        one_of("metric", name, tuple(METRICS), " or module:function")
