"""Where a model will run, as data: what kernels take there, what pays, what they get wrong."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path

from quant_core.fields import one_of
from quant_core.plan.compute import Compute


class Runtime(StrEnum):
    """Where models can be timed here."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "OpenVINO"


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """What a runtime's kernels take on one thread, in nanoseconds; only ratios matter.

    float_product, integer_product  a multiply-add of a Conv, MatMul or Gemm
    float_unfolded, integer_unfolded
                    an element of the rows that it multiplies, beside its products; a Conv reads a
                    pixel once for each of its taps
    float_output, integer_output    an element of its output
    conversion                      an element that becomes integer or float, a change of its layout
                                    included
    one_row                         integers over float, for a product with one row: not a time
    """

    float_product: float
    integer_product: float
    float_unfolded: float
    integer_unfolded: float
    float_output: float
    integer_output: float
    conversion: float
    one_row: float


@dataclass(frozen=True, slots=True)
class Target:
    """A class of CPUs, or another runtime, as its kernels see a model.

    activation_signed  int8 activations (ARM dot product) or uint8 ones (x86: an int8 tensor with
                       two consumers does not fuse there)
    saturates          neighbours of the reduction axis are added in saturating int16 (vpmaddubsw)
    pairs_channels     files run also where these neighbours are channels of one tap; onnxruntime
                       pairs the last of an odd number with the first of the next tap
    times              way of computing -> time of a node over its float time, where nothing can be
                       timed; a way that is not there never pays
    kernels            what kernels take where nothing can be timed: a node that loses by integers,
                       conversions included, stays in float; None if that is not known
    timed_on           the hosts, by `host_target_name`, whose timings hold for this target
    timed_in           the runtime in which they are taken, where it is installed
    activation_bits    8 or 16
    zero_points        activations may have one other than the middle of their integers
    is_onnxruntime     folds constants when it loads, and has operators of its own; otherwise only
                       standard ONNX, with weights behind DequantizeLinear, is written
    decodes_int4       a node multiplies in integers also where other nodes make its int8 weight of
                       a stored 4-bit one
    block_sizes        how many 4-bit weights of a matrix may share a scale behind DequantizeLinear;
                       none where only those of an output channel can
    int4_per_channel   4-bit weights of an output channel may share a scale there
    gathers_integers   a Gather may pick rows of a table of int8; otherwise it picks those that
                       DequantizeLinear writes
    integer_bias       biases may be int32 behind DequantizeLinear; otherwise they stay float
    slow_in_integers   operators that are slower in integers, and "depthwise Conv" if these are
    only_constants     operators that do not load with weights behind DequantizeLinear where others
                       compute in integers
    requantizes        a kernel computes in integers only if its output is quantized again; where it
                       is not so, only what integer kernels read is quantized
    requantizes_all    also where onnxruntime's kernels write float, as those of MatMul and Gemm do
    counts_padding     an AveragePool that counts its padding pads integers with their zero point;
                       otherwise it is written as one that does not
    has_hard_sigmoid   HardSigmoid has a fast kernel; otherwise it is written as Clip
    one_scale          operators whose weights have one scale, not one for each channel
    output_ranges      operator -> the range of its quantized output, whatever samples say
    rewrites           rules of the float graph that pay there, though they are not timed there
    note               what has not been shown: "" if files were run there
    """

    name: str
    activation_signed: bool
    saturates: bool
    times: Mapping[Compute, float]
    kernels: KernelTimes | None = None
    timed_on: tuple[str, ...] = ()
    timed_in: Runtime = Runtime.ONNXRUNTIME
    pairs_channels: bool = False
    activation_bits: int = 8
    zero_points: bool = True
    is_onnxruntime: bool = True
    decodes_int4: bool = True
    block_sizes: tuple[int, ...] = (16, 32, 64, 128)
    int4_per_channel: bool = True
    gathers_integers: bool = True
    integer_bias: bool = True
    slow_in_integers: frozenset[str] = frozenset()
    only_constants: frozenset[str] = frozenset()
    requantizes: bool = True
    requantizes_all: bool = False
    counts_padding: bool = True
    has_hard_sigmoid: bool = True
    one_scale: frozenset[str] = frozenset()
    output_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    note: str = ""


_HALF = {Compute.STATIC: 0.5, Compute.DYNAMIC: 0.5}
_CPU = {**_HALF, Compute.BLOCKS: 0.5}
TARGETS = {
    t.name: t
    for t in (
        # Right on every x86 CPU from AVX2 to AMX: no pair of weights can saturate. On most models
        # that costs at most 1 dB, and no speed (python -m tests.bench.cpus).
        Target("x86", activation_signed=False, saturates=True, times=_CPU, timed_on=("x86",)),
        Target("x86-vnni", activation_signed=False, saturates=False, times=_CPU, timed_on=("x86",)),
        Target("arm64", activation_signed=True, saturates=False, times=_CPU, timed_on=("arm64",)),
        # onnxruntime-web on one thread: MatMulNBits and DequantizeLinear of weights run at a
        # fraction of float's speed, and integers gain less than on the CPU outside the browser: a
        # product of one row loses by them (1 x 256 by 256 x 768: 0.46x).
        # A file is safe from saturation, as relaxed SIMD may add pairs in int16.
        # python -m tests.bench.runtimes
        Target(
            "web",
            activation_signed=False,
            saturates=True,
            times={Compute.STATIC: 0.7, Compute.DYNAMIC: 0.65},
            kernels=KernelTimes(
                0.083, 0.027, 0.425, 0.596, 0.585, 2.395, conversion=0.933, one_row=1.47
            ),  # python -m tests.bench.kernels
            slow_in_integers=frozenset({"depthwise Conv", "LSTM"}),
        ),
        # Runs static models in uint8, but MatMulInteger slower than float, and multiplies weights
        # that other nodes decode in float. It merges what follows a Conv into it up to the next
        # QuantizeLinear, a hard swish too; HardSigmoid has no fast kernel there. Convs run along
        # the last axis. Without VNNI it adds pairs of channels in int16: files are safe there, too.
        # Beside integers it does not fold what decodes the weights of an LSTM, whose kernel takes
        # constants. python -m tests.bench.runtimes
        Target(
            "openvino",
            activation_signed=False,
            saturates=True,
            times={Compute.STATIC: 0.5},
            timed_on=("x86", "arm64"),
            timed_in=Runtime.OPENVINO,
            pairs_channels=True,
            is_onnxruntime=False,
            decodes_int4=False,
            only_constants=frozenset({"GRU", "LSTM", "RNN"}),
            requantizes=False,
            counts_padding=False,
            has_hard_sigmoid=False,
            rewrites=("wide_kernels",),
        ),
        # Source: NVIDIA TensorRT documentation, "Working with Quantized Types": zero points are 0,
        # weights and activations int8, biases float; "Quantization Schemes": 4 bits for weights
        # alone, with a scale for each block of 64 or 128 along one of the last two axes. And
        # onnx-tensorrt, docs/operators.md, for TensorRT 10.15: DequantizeLinear takes int8, Gather
        # and Cast do not.
        Target(
            "tensorrt",
            activation_signed=True,
            zero_points=False,
            saturates=False,
            times={Compute.STATIC: 0.5},
            is_onnxruntime=False,
            decodes_int4=False,
            block_sizes=(64, 128),
            int4_per_channel=False,
            gathers_integers=False,
            integer_bias=False,
            note="written by TensorRT's documented rules, not run there",
        ),
        # Source: onnxruntime's documentation of the QNN execution provider, "Running a quantized
        # model": uint16 activations with int8 weights, symmetric; and its own tool
        # (onnxruntime.quantization.execution_providers.qnn): no MatMul with a scale for each
        # channel, and what Sigmoid and Tanh must write. A Gemm that writes float runs elsewhere.
        # Qualcomm's guidelines for the HTP, "INT4 encodings for weights": per tensor and per
        # channel; blocks behind DequantizeLinear do not run there (onnxruntime-qnn, issue 650).
        Target(
            "qnn",
            activation_signed=False,
            activation_bits=16,
            saturates=False,
            times={Compute.STATIC: 0.5},
            is_onnxruntime=False,
            decodes_int4=False,
            block_sizes=(),
            requantizes_all=True,
            one_scale=frozenset({"MatMul"}),
            output_ranges={"Sigmoid": (0.0, 1 - 2**-16), "Tanh": (-1.0, 1 - 2**-15)},
            note="run in an emulation of the HTP only, not on a chip",
        ),
        # Safe wherever it runs: in onnxruntime and in OpenVINO.
        Target(
            "portable",
            activation_signed=False,
            saturates=True,
            times=_HALF,
            timed_on=("x86", "arm64", "portable"),
            pairs_channels=True,
            is_onnxruntime=False,
            counts_padding=False,
        ),
    )
}
RENAMED = {"x86-avx2": "x86"}  # earlier names, which manifests and plans may hold


def find_target(name: str) -> Target:
    """The target of that name; `auto` is the one that is right on every CPU of this host's family.

    Raises: RequestError for any other name.
    """
    one_of("target", name, ("auto", *TARGETS, *RENAMED))
    if name == "auto":
        return TARGETS[host_target_name()]
    return TARGETS[RENAMED.get(name, name)]


@cache
def host_target_name() -> str:
    """x86 on any x86 CPU, arm64 on ARM, portable elsewhere."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return "arm64"
    return "x86" if machine in ("x86_64", "amd64") else "portable"


def host_kernels() -> str:
    """The kernels that onnxruntime picks on this CPU, which what is timed depends on.

    x86-vnni where the CPU adds products of uint8 and int8 in int32 at once, x86-avx2 on other x86.
    """
    if host_target_name() != "x86":
        return host_target_name()
    return "x86-vnni" if cpu_flags() & {"avx512_vnni", "avx_vnni"} else "x86-avx2"


def cpu_flags() -> frozenset[str]:
    """Instruction sets that Linux reports, empty elsewhere (so that an unknown x86 counts as AVX2,
    which is safe).
    """
    return frozenset(_of_cpu("flags").split())


def cpu_name() -> str:
    """The CPU's name, as its maker gives it."""
    return _of_cpu("model name") or platform.processor()


def _of_cpu(key: str) -> str:
    """What Linux says of the first CPU, empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next(
        (line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith(key)), ""
    )
