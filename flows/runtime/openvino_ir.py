"""A quantized model as OpenVINO's own files, checked to run there, in integers, and faster.

OpenVINO is an extra: `pip install quantmill[openvino]`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.timing import Timing, summarize, take_turns
from quant_core.model.session import open_session, run

# Kernels that multiply by weights, as OpenVINO's executable graph calls them.
MULTIPLY = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "GroupFullyConnected")
INTEGERS = ("u8", "i8")
# SQNR of a float model's outputs by two runtimes: what they round differently is far less noise.
EQUAL_DB = 60.0
# By how much a quantized model may be less exact there: other rounding at most doubles the noise.
LOST_DB = 3.0

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class ExportedIR:
    """What was written, and what OpenVINO makes of it.

    integers, multiplying  kernels that multiply by weights in int8, and all that multiply
    timing                 of the quantized model over the float one, both in OpenVINO
    float_db               SQNR in dB of the float model there against the float model here
    here_db, there_db      of the quantized model here, and there, against the float model here
    note                   what is wrong with it, "" if nothing
    """

    output: str
    size_bytes: int
    version: str
    integers: int
    multiplying: int
    timing: Timing
    float_db: float | None
    here_db: float | None
    there_db: float | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | {"timing": asdict(self.timing)}


def export_ir(
    original: Path, quantized: Path, output: Path, feeds: Sequence[Feed], seconds: float = 1.0
) -> ExportedIR:
    """Write `output` (.xml, and .bin beside it) and check it on the feeds.

    Raises: RequestError if OpenVINO is not installed, or the .bin is somebody else's; ModelError if
    it cannot read or run a model.
    """
    openvino = import_openvino()
    weights = output.with_suffix(".bin")
    if weights.exists() and not output.exists():
        hint = "Name another output with -o"
        raise RequestError("exists, and is no earlier export", str(weights), hint)
    core = openvino.Core()
    openvino.save_model(_read(core, quantized), output, compress_to_fp16=False)
    first, second = (partial(_run, _compile(core, path), path) for path in (original, output))
    sessions = open_session(original), open_session(quantized)
    names = [tensor.name for tensor in sessions[0].get_outputs()]
    wanted, rounded = ([run(session, feed) for feed in feeds] for session in sessions)
    float_db = compare(wanted, [first(feed) for feed in feeds], names).sqnr_db
    here_db = compare(wanted, rounded, names).sqnr_db
    there_db = compare(wanted, [second(feed) for feed in feeds], names).sqnr_db
    calls = [partial(model, feeds[0]) for model in (first, second)]
    timing = summarize(take_turns(calls, seconds=seconds, clock=time.process_time), 1)
    kinds = kernels_of(second.args[0])
    multiplying = [precision for kind, precision in kinds if kind in MULTIPLY]
    integers = sum(precision in INTEGERS for precision in multiplying)
    return ExportedIR(
        str(output),
        sum(path.stat().st_size for path in (output, weights)),
        openvino.__version__,
        integers,
        len(multiplying),
        timing,
        float_db,
        here_db,
        there_db,
        "; ".join(_notes(integers, timing, float_db, here_db, there_db)),
    )


def _notes(
    integers: int,
    timing: Timing,
    float_db: float | None,
    here_db: float | None,
    there_db: float | None,
) -> Iterator[str]:
    """What is wrong with an export, a sentence each."""
    if float_db is not None and float_db < EQUAL_DB:
        yield f"OpenVINO computes the float model itself wrongly ({float_db:.0f} dB)"
    elif here_db is not None and there_db is not None and there_db < here_db - LOST_DB:
        yield f"OpenVINO computes it less exactly: {there_db:.0f} dB, onnxruntime {here_db:.0f} dB"
    if not integers:
        yield "OpenVINO multiplies nothing of it in integers"
    if timing.speedup < 1:
        yield f"OpenVINO runs it at {timing.speedup:.2f}x of its float speed"


def import_openvino() -> Any:
    """The package. Raises: RequestError if it is not installed."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        hint = "pip install quantmill[openvino]"
        raise RequestError("OpenVINO is not installed", "--export openvino", hint) from error


def kernels_of(compiled: Any) -> list[tuple[str, str]]:
    """(kind, precision) of each kernel of a compiled model, in its order."""
    nodes = compiled.get_runtime_model().get_ordered_ops()
    infos = [node.get_rt_info() for node in nodes]
    return [(str(_text(i, "layerType")), str(_text(i, "runtimePrecision"))) for i in infos]


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _read(core: Any, path: Path) -> Any:
    try:
        return core.read_model(path)
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot read it: {_last_line(error)}", str(path)) from error


def _compile(core: Any, path: Path) -> Any:
    model = _read(core, path)
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        return core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        problem = f"OpenVINO cannot compile it: {_last_line(error)}"
        raise ModelError(problem, str(path)) from error


def _run(compiled: Any, path: Path, feed: Feed) -> list[NDArray[Any]]:
    try:
        found = compiled(dict(feed))
    except RuntimeError as error:
        raise ModelError(f"OpenVINO cannot run it: {_last_line(error)}", str(path)) from error
    return [np.asarray(found[output]) for output in compiled.outputs]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or ["no reason given"])[-1][:200]
