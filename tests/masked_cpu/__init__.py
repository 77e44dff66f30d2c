"""Python as it runs on an x86 CPU with AVX2, but without AVX-512, VNNI and AMX.

onnxruntime then takes its AVX2 kernels, at their real speed and with their real saturation, and so
does OpenVINO. A small C library (masked_cpu.c) answers the CPUID instruction. Where the kernel
cannot make CPUID trap, as on AMD, the CPUIDs of copies of both are overwritten by breakpoints.
(ONEDNN_MAX_CPU_ISA is no such mask: the rest of OpenVINO goes by the CPU, and models do not load.)
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.models import sketch

# Package -> its libraries that ask for the CPU.
LIBRARIES = {
    "onnxruntime": ("capi/onnxruntime_pybind11_state*.so",),
    "openvino": ("libs/libopenvino.so*", "libs/libopenvino_intel_cpu_plugin.so"),
}
SOURCE = Path(__file__).with_name("masked_cpu.c")
CPUID, BREAKPOINT = b"\x0f\xa2", b"\xcc\x90"  # the latter: int3; nop
WINDOW = 64  # bytes before an address from which a disassembler falls in step with the code
# The sum of 64 products of 255 and 127: right, and as AVX2 kernels add it in int16.
RIGHT, SATURATED = 64 * 255 * 127, 32 * (2**15 - 1)
PROBE = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {"a": numpy.full((1, 64), 255, numpy.uint8)})[0][0, 0])
"""


class CannotMask(Exception):
    """Why this machine cannot pose as an older one."""


@functools.cache
def environment(folder: Path) -> dict[str, str]:
    """The environment in which a Python process sees such a CPU; what it needs goes to `folder`.

    Raises: CannotMask.
    """
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise CannotMask("is for x86-64 Linux")
    if shutil.which("gcc") is None:
        raise CannotMask("needs gcc")
    library = folder / "masked_cpu.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
    subprocess.run(command, check=True)
    model = folder / "probe.onnx"
    text = "(uint8[1, 64] a) => (int32[1, 16] y) { y = MatMulInteger(a, b) }"
    weights = {"b": np.full((64, 16), 127, np.int8)}
    model.write_bytes(sketch(text, weights).SerializeToString())
    if _probe(model, os.environ) != RIGHT:
        raise CannotMask("this CPU has no VNNI that could be hidden")
    masked = {**os.environ, "LD_PRELOAD": str(library)}
    if _probe(model, masked) == SATURATED:
        return masked
    if shutil.which("objdump") is None:
        raise CannotMask("this CPU's CPUID cannot trap, and there is no objdump to find it")
    copied = _with_breakpoints(folder / "packages")
    paths = [str(copied), *filter(None, [os.environ.get("PYTHONPATH")])]
    masked["PYTHONPATH"] = os.pathsep.join(paths)
    if _probe(model, masked) != SATURATED:
        raise CannotMask("VNNI could not be hidden")
    return masked


def run_masked(arguments: Sequence[str], folder: Path) -> None:
    """Run Python with these arguments there. Raises: CannotMask."""
    masked = environment(folder)
    subprocess.run([sys.executable, *arguments], env=masked, check=True)


def _probe(model: Path, environment: dict[str, str] | os._Environ[str]) -> int:
    """The sum that onnxruntime computes; 0 if the process dies."""
    command = [sys.executable, "-c", PROBE, str(model)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0


def _with_breakpoints(packages: Path) -> Path:
    """A folder with those of the packages that are installed, in whose libraries each CPUID is a
    breakpoint.
    """
    for package, patterns in LIBRARIES.items():
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            continue
        copied = packages / package
        shutil.copytree(Path(found.origin).parent, copied, copy_function=os.symlink)
        for library in (path for pattern in patterns for path in copied.glob(pattern)):
            code = bytearray(library.read_bytes())
            for offset in _cpuids(library, code):
                code[offset : offset + 2] = BREAKPOINT
            library.unlink()
            library.write_bytes(code)
    return packages


def _cpuids(library: Path, code: bytes) -> list[int]:
    """The offsets of the CPUID instructions in the file, and not of such bytes in others."""
    sections = _objdump("-h", "-j", ".text", str(library))
    found = re.search(r"\.text\s+(\w+)\s+(\w+)\s+\w+\s+(\w+)", sections)
    assert found is not None, sections
    size, address, start = (int(number, 16) for number in found.groups())
    places = [m.start() for m in re.finditer(re.escape(CPUID), code[start : start + size])]

    def is_instruction(place: int) -> bool:
        """Whether the disassembly from a little before has an instruction there."""
        at = address + place
        first, last = max(address, at - WINDOW), at + WINDOW
        window = f"--start-address={first}", f"--stop-address={last}"
        code = _objdump("-d", *window, str(library))
        return re.search(rf"^\s*{at:x}:.*\bcpuid$", code, re.MULTILINE) is not None

    with ThreadPoolExecutor() as pool:
        kept = pool.map(is_instruction, places)
    return [start + place for place, is_kept in zip(places, kept, strict=True) if is_kept]


def _objdump(*arguments: str) -> str:
    command = ["objdump", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
