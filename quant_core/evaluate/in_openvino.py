"""How models run in OpenVINO: what they compute there, by which kernels, and how fast.

OpenVINO is an extra. It runs in a process of its own, as some models end the one that runs them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.errors import DataError, ModelError
from quant_core.evaluate.kernels import Arithmetic, Kernel
from quant_core.evaluate.timing import Timing, summarize
from quant_core.model import files
from quant_core.model.session import Feed
from quant_core.versions import installed_version

START_S = 120.0  # to start, and to read, compile and run the models once, on a busy machine
# OpenVINO reports of a kernel the mean of all its runs, in which each pause of the process stays:
# the least of several processes has the fewest.
PROCESSES = 3
BESIDE_S = 10.0  # times `seconds`, for what that does not count
OTHER_RUNTIME = "Leave it to another runtime: onnxruntime runs it"
# What starts the other process: it imports what this one would.
START = """import sys; sys.path[:] = {path!r}
from quant_core.evaluate.in_openvino_main import main; main({folder!r})"""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """What came of one or more models.

    outputs  model -> feed -> outputs
    times    seconds per call, shape (rounds, models); None if nothing was timed
    kernels  model -> its kernels, in the order in which they run; their times are 0 unless measured
    """

    outputs: list[list[list[NDArray[Any]]]]
    times: NDArray[Any] | None
    kernels: list[list[Kernel]]


def openvino_version() -> str | None:
    """The version that is installed, None without any."""
    return installed_version("openvino")


def run_in_openvino(
    models: Sequence[Path],
    feeds: Sequence[Feed],
    *,
    seconds: float = 0.0,
    profiles: bool = False,
    export: tuple[Path, Path] | None = None,
) -> Runs:
    """Run all models on all feeds, one thread each.

    seconds   how long they are timed in turns on the first feed, 0 for not at all
    profiles  whether their kernels are timed on it, all models in turns
    export    a model, and the .xml that is written of it before all else

    Raises: ModelError if OpenVINO cannot read, compile or run one of them, its end included, or is
    not installed; DataError for feeds of text.
    """
    with tempfile.TemporaryDirectory(prefix="quantmill-") as name:
        folder = Path(name)
        _write_feeds(folder, feeds)
        request = {
            "models": [str(path) for path in models],
            "feeds": [list(feed) for feed in feeds],
            "seconds": seconds,
            "profiles": profiles,
            "export": [str(path) for path in export or ()],
        }
        Path(folder, "request.json").write_text(json.dumps(request), encoding="utf-8")
        program = START.format(path=[entry for entry in sys.path if entry], folder=name)
        answer = _answer(folder, [sys.executable, "-c", program], START_S + BESIDE_S * seconds)
        with np.load(folder / "outputs.npz") as arrays:
            flat = [arrays[f"arr_{i}"] for i in range(len(arrays.files))]
    outputs = [[[flat[i] for i in numbers] for numbers in of_model] for of_model in answer["found"]]
    times = np.array(answer["times"]) if seconds else None
    return Runs(outputs, times, [[_kernel(row) for row in rows] for rows in answer["kernels"]])


def race_in_openvino(
    original: Path, quantized: Path | ir.Model, feed: Feed, seconds: float
) -> Timing:
    """The CPU time of both models, in turns in PROCESSES. Raises: as `run_in_openvino`."""
    with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
        models = original, _as_file(quantized, Path(folder))
        each = seconds / PROCESSES
        runs = [run_in_openvino(models, [feed], seconds=each) for _ in range(PROCESSES)]
    return summarize(np.concatenate([run.times for run in runs if run.times is not None]), 1)


def profile_in_openvino(models: Sequence[Path | ir.Model], feed: Feed) -> list[list[Kernel]]:
    """The kernels of each model, and how long each takes: all models in turns, and the least of
    PROCESSES. Raises: as `run_in_openvino`.
    """
    with tempfile.TemporaryDirectory(prefix="quantmill-") as name:
        folders = [Path(name, str(i)) for i in range(len(models))]
        for folder in folders:
            folder.mkdir()
        paths = [_as_file(model, folder) for model, folder in zip(models, folders, strict=True)]
        found = [run_in_openvino(paths, [feed], profiles=True).kernels for _ in range(PROCESSES)]
    return [
        [
            replace(same[0], ms=min(kernel.ms for kernel in same))
            for same in zip(*of_model, strict=True)
        ]
        for of_model in zip(*found, strict=True)
    ]


def _answer(folder: Path, command: list[str], limit_s: float) -> dict[str, Any]:
    """What the other process answers. Raises: ModelError if it says why it cannot, or ends."""
    quiet = subprocess.DEVNULL
    try:
        code = subprocess.run(command, stdin=quiet, capture_output=True, timeout=limit_s).returncode
        problem = f"it ended with exit code {code}"
        if code < 0:
            problem = f"it crashed with {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired:
        problem = f"no end within {limit_s:.0f} s"
    answer = folder / "answer.json"
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        problem = found.get("problem", "")
        if not problem:
            return found
    doing = folder / "doing.json"
    if not doing.exists():
        hint = 'pip install "quantmill[openvino]"'
        raise ModelError(f"OpenVINO does not start: {problem}", hint=hint)
    verb, path = json.loads(doing.read_text(encoding="utf-8"))
    raise ModelError(f"OpenVINO cannot {verb} it: {problem}", path, OTHER_RUNTIME)


def _write_feeds(folder: Path, feeds: Sequence[Feed]) -> None:
    arrays = [np.asarray(x) for feed in feeds for x in feed.values()]
    if any(x.dtype.kind in "OSU" for x in arrays):
        raise DataError("OpenVINO takes no texts")
    np.savez(folder / "feeds.npz", *arrays)


def _as_file(model: Path | ir.Model, folder: Path) -> Path:
    if isinstance(model, Path):
        return model
    path = folder / "model.onnx"
    files.save(model, path, external_data="model.data" if files.is_large(model) else None)
    return path


def _kernel(row: Mapping[str, Any]) -> Kernel:
    """A kernel as the other process tells of it."""
    of_precision = {"u8": Arithmetic.INT8, "i8": Arithmetic.INT8, "f32": Arithmetic.FLOAT32}
    arithmetic = of_precision.get(row["precision"], Arithmetic.INDICES)
    covers = tuple(layer for layer in row["layers"].split(",") if layer)
    return Kernel(row["name"], row["kind"], arithmetic, row["ms"], covers)
