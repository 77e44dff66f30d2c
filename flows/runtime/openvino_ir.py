"""A quantized model as OpenVINO's own files, checked to run there, in integers, and faster.

OpenVINO is an extra: `pip install "quantmill[openvino]"`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant_core.errors import RequestError
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.in_openvino import openvino_version, run_in_openvino
from quant_core.evaluate.kernels import Arithmetic
from quant_core.evaluate.timing import Timing, summarize
from quant_core.model.atomic import move_synced
from quant_core.model.session import Feed, open_session, run

# Kernels that multiply by weights, as OpenVINO's executable graph calls them.
MULTIPLY = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "GroupFullyConnected")
# SQNR of a float model's outputs by two runtimes: what they round differently is far less noise.
EQUAL_DB = 60.0
# By how much a quantized model may be less exact there: other rounding at most doubles the noise.
LOST_DB = 3.0


@dataclass(frozen=True, slots=True)
class ExportedIR:
    """What was written, and what OpenVINO makes of it.

    integers, multiplying  kernels that multiply by weights in int8, and all that multiply
    timing                 of the quantized model over the float one, both in OpenVINO
    float_db               SQNR in dB of the float model there against the float model here
    here_db, there_db      of the quantized model here, and there, against the float model here
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

    @property
    def note(self) -> str:
        """What is wrong with it, "" if nothing is."""
        return "; ".join(self._flaws())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"note": self.note}

    def _flaws(self) -> Iterator[str]:
        """What is wrong with it, a sentence each."""
        here, there = self.here_db, self.there_db
        if self.float_db is not None and self.float_db < EQUAL_DB:
            yield f"OpenVINO computes the float model itself wrongly ({self.float_db:.0f} dB)"
        elif here is not None and there is not None and there < min(here - LOST_DB, EQUAL_DB):
            yield f"OpenVINO computes it less exactly: {there:.0f} dB, onnxruntime {here:.0f} dB"
        if not self.integers:
            yield "OpenVINO multiplies nothing of it in integers"
        if self.timing.speedup < 1:
            yield f"OpenVINO runs it at {self.timing.speedup:.2f}x of its float speed"


def weights_beside(output: Path) -> Path:
    """Where the weights of `output` (.xml) go. Raises: RequestError if that is somebody else's."""
    weights = output.with_suffix(".bin")
    if weights.exists() and not output.exists():
        hint = "Name another output with -o"
        raise RequestError("exists and is no earlier export", str(weights), hint)
    return weights


def export_ir(
    original: Path, quantized: Path, output: Path, feeds: Sequence[Feed], seconds: float = 1.0
) -> ExportedIR:
    """Write `output` (.xml, and .bin beside it) and check it on the feeds.

    Nothing is written if that does not run. Raises: RequestError if OpenVINO is not installed, or
    the .bin is somebody else's; ModelError if it cannot read or run a model.
    """
    version = check_openvino()
    weights = weights_beside(output)
    with tempfile.TemporaryDirectory(prefix=".quantmill-", dir=output.parent) as folder:
        made = Path(folder, output.name)
        models, export = (original, made), (quantized, made)
        there = run_in_openvino(models, feeds, seconds=seconds, export=export)
        move_synced(made.with_suffix(".bin"), weights)
        move_synced(made, output)
    sessions = open_session(original), open_session(quantized)
    names = [tensor.name for tensor in sessions[0].get_outputs()]
    wanted, rounded = ([run(session, feed) for feed in feeds] for session in sessions)
    assert there.times is not None
    multiplying = [k.arithmetic for k in there.kernels[1] if k.op_type in MULTIPLY]
    return ExportedIR(
        output=str(output),
        size_bytes=sum(path.stat().st_size for path in (output, weights)),
        version=version,
        integers=multiplying.count(Arithmetic.INT8),
        multiplying=len(multiplying),
        timing=summarize(there.times, 1),
        float_db=compare(wanted, there.outputs[0], names).sqnr_db,
        here_db=compare(wanted, rounded, names).sqnr_db,
        there_db=compare(wanted, there.outputs[1], names).sqnr_db,
    )


def check_openvino() -> str:
    """The version that is installed. Raises: RequestError if none is."""
    version = openvino_version()
    if version is None:
        hint = 'pip install "quantmill[openvino]"'
        raise RequestError("OpenVINO is not installed", "--export openvino", hint)
    return version
