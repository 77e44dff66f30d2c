"""ONNX's own test models, quantized in every way: nothing crashes, nothing is silently wrong.

    python -m tests.bench.backend [NAME ...]

The models are those that `onnx.backend.test.case` makes. Most are one operator whose operands are
all inputs, and have no weight. Each is tried as it is, and with every float input but the first
made a constant. A model counts if onnxruntime runs it on its own data.

refused   with a reason; "nothing to quantize" is counted apart
crashed   an error that is no QuantError
invalid   the file does not load, or does not run
broken    an output is below FLOOR_DB, or not finite where float is
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.model as model_cases
import onnx.backend.test.case.node as node_cases
from onnx import numpy_helper

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.errors import QuantError
from quant_core.model.session import open_session, run

WAYS: dict[str, dict[str, Any]] = {
    "weight-only": {"mode": "weight_only"},
    "dynamic": {"mode": "dynamic"},
    "static": {"mode": "static"},
    "int4": {"mode": "weight_only", "bits": 4},
}
FLOOR_DB = {"int4": 8.0}
DEFAULT_FLOOR_DB = 12.0
Case = tuple[str, onnx.ModelProto, dict[str, np.ndarray]]


def cases(names: list[str]) -> Iterator[Case]:
    """(name, model, feed): each model as it is, then with its operands as constants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [*node_cases.collect_testcases(None), *model_cases.collect_testcases()]
    for case in found:
        wanted = not names or any(name in case.name for name in names)
        if case.model is None or not case.data_sets or not wanted:
            continue
        inputs = case.data_sets[0][0]
        values = [_array(value) for value in inputs]
        if any(value is None for value in values):
            continue  # a sequence or an optional
        given = list(case.model.graph.input)
        feed = {info.name: value for info, value in zip(given, values, strict=False)}
        yield case.name, case.model, feed
        constant = with_constants(case.model, feed)
        if constant is not None:
            yield f"{case.name} (constants)", *constant


def with_constants(
    model: onnx.ModelProto, feed: Mapping[str, np.ndarray]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]] | None:
    """The model whose floats, but the first input, are constants; None if it has no others."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = [info.name for info in copy.graph.input]
    moved = [n for n in names[1:] if n in feed and feed[n].dtype.kind == "f" and feed[n].size > 1]
    if not moved:
        return None
    for info in [i for i in copy.graph.input if i.name in moved]:
        copy.graph.input.remove(info)
        copy.graph.initializer.append(numpy_helper.from_array(feed[info.name], info.name))
    return copy, {n: v for n, v in feed.items() if n not in moved}


def outcome(path: Path, feed: dict[str, np.ndarray], expected: list[np.ndarray], way: str) -> str:
    """What becomes of the model in that file: "sound", or what is wrong."""
    output = path.with_name("quantized.onnx")
    output.unlink(missing_ok=True)
    static = way == "static"
    try:
        calibration = [feed] if static else None
        quantize_model(path, output, QuantConfig(**WAYS[way]), calibration=calibration)
    except QuantError as error:
        if "nothing to quantize" in error.problem or "quantized already" in error.problem:
            return "nothing to quantize"
        return f"refused: {error}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"crashed: {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        )
    try:
        got = run(open_session(output), feed)
    except QuantError as error:
        return f"invalid: {error}"
    worst = min((_sqnr_db(a, b) for a, b in zip(expected, got, strict=True)), default=np.inf)
    floor = FLOOR_DB.get(way, DEFAULT_FLOOR_DB)
    return "sound" if worst >= floor else f"broken: {worst:.1f} dB"


def _sqnr_db(expected: np.ndarray, got: np.ndarray) -> float:
    if expected.dtype.kind != "f" or not expected.size:
        return np.inf
    if expected.shape != got.shape:
        return -np.inf
    a, b = expected.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    a, b = a[finite], b[finite]
    if not np.isfinite(b).all():
        return -np.inf
    noise, signal = np.sum((a - b) ** 2), np.sum(a**2)
    return np.inf if noise <= 1e-12 * a.size else float(10 * np.log10(max(signal, 1e-300) / noise))


def _array(value: Any) -> np.ndarray | None:
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    if isinstance(value, (list, dict)) or value is None:
        return None
    array = np.asarray(value)
    return array.astype(str) if array.dtype == object else array


def main(arguments: list[str]) -> int:
    started, counts, faults = time.monotonic(), Counter[tuple[str, str]](), []
    runs = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        for name, model, feed in cases(arguments):
            onnx.save(model, path)
            try:
                expected = run(open_session(path), feed)
            except QuantError:
                continue  # onnxruntime does not run it
            runs += 1
            is_finite = all(np.isfinite(a).all() for a in feed.values() if a.dtype.kind == "f")
            for way in WAYS:
                if way == "static" and not is_finite:
                    continue  # samples with NaN are refused
                found = outcome(path, feed, expected, way)
                kind = found.split(":")[0]
                counts[way, kind] += 1
                if kind not in ("sound", "nothing to quantize"):
                    faults.append(f"{way:12} {name}: {found}")
    for fault in faults:
        print(fault[:400])
    print(f"{runs} models that onnxruntime runs, {time.monotonic() - started:.0f} s")
    kinds = sorted({kind for _, kind in counts})
    for way in WAYS:
        print(f"{way:12}", ", ".join(f"{kind} {counts[way, kind]}" for kind in kinds))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
