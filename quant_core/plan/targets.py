"""Which CPU a model is for, as data: what its kernels take, and what they get wrong."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quant_core.config import one_of


@dataclass(frozen=True, slots=True)
class Target:
    """A class of CPUs, as onnxruntime's kernels see it.

    activation_signed  int8 activations (ARM dot product) or uint8 ones (x86: an int8 tensor with
                       two consumers does not fuse there)
    saturates          neighbours of the reduction axis are added in saturating int16 (vpmaddubsw)
    is_onnxruntime     folds constants when it loads, and has operators of its own; otherwise only
                       standard ONNX, with weights behind DequantizeLinear, is written
    """

    name: str
    activation_signed: bool
    saturates: bool
    is_onnxruntime: bool = True


TARGETS = {
    t.name: t
    for t in (
        # Right on every x86 CPU from AVX2 to AMX: no pair of weights can saturate. On most models
        # that costs at most 1 dB, and no speed (python -m tests.bench.accuracy).
        Target("x86", activation_signed=False, saturates=True),
        Target("x86-vnni", activation_signed=False, saturates=False),
        Target("arm64", activation_signed=True, saturates=False),
        # Safe wherever it runs.
        Target("portable", activation_signed=False, saturates=True, is_onnxruntime=False),
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
    """As its maker calls it."""
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
