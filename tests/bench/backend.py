"""ONNX's own test models, quantized in every way: nothing crashes, nothing is silently wrong.

    python -m tests.bench.backend [--data FOLDER] [--jobs N] [NAME ...]

The models are those that `onnx.backend.test.case` makes, and those that the wheel of onnx holds;
with --data, those below that folder: onnx 1.17.0 carries all of its models, in
`onnx/backend/test/data`. Most are one operator whose operands are all inputs, and have no weight.
Each is tried as it is, and with every float input but the first made a constant. A model counts if
onnxruntime runs it on its own data; those without data of their own run on random samples.

refused   with a reason; "nothing to quantize" is counted apart
crashed   an error that is no QuantError
invalid   the file does not load, or does not run
broken    an output is below its floor, or not finite where float is
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from onnx import numpy_helper

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import QuantError
from quant_core.evaluate import timing
from quant_core.evaluate.timing import take_turns
from quant_core.model.session import open_session, run

WAYS: dict[str, dict[str, Any]] = {
    "weight-only": {"mode": "weight_only"},
    "dynamic": {"mode": "dynamic"},
    "static": {"mode": "static"},
    "int4": {"mode": "weight_only", "bits": 4},
    "static int4": {"mode": "static", "bits": 4},
}
INSTALLED = Path(onnx.__file__).parent / "backend/test/data"
SOUND = ("sound", "nothing to quantize")
Feed = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A model with its own data; without any it runs on random samples."""

    name: str
    model: onnx.ModelProto
    feeds: Sequence[Feed] = ()


def made_cases() -> Iterator[Case]:
    """The models that the installed onnx makes."""
    import onnx.backend.test.case.model as models  # each takes seconds
    import onnx.backend.test.case.node as nodes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [*nodes.collect_testcases(None), *models.collect_testcases()]
    for case in found:
        if case.model is not None and case.data_sets:
            feeds = [_feed(case.model, inputs) for inputs, _ in case.data_sets]
            yield Case(case.name, case.model, feeds)


def stored_cases(folder: Path) -> Iterator[Case]:
    """The models below a folder: NAME/model.onnx beside test_data_set_*, or NAME.onnx alone."""
    for path in sorted(folder.rglob("*.onnx")):
        model = onnx.load(path)
        if path.name != "model.onnx":
            yield Case(path.stem, model)
            continue
        sets = sorted(path.parent.glob("test_data_set_*"))
        feeds = [_feed(model, [_stored(model, s, i) for i in range(_count(s))]) for s in sets]
        yield Case(path.parent.name, model, feeds)


def with_constants(case: Case) -> Case | None:
    """The model whose floats, but the first input, are constants; None if it has no others."""
    if not case.feeds:
        return None
    copy, feed = onnx.ModelProto(), case.feeds[0]
    copy.CopyFrom(case.model)
    moved = [n for n in list(feed)[1:] if _is_float(feed[n]) and feed[n].size > 1]
    if not moved:
        return None
    for info in [i for i in copy.graph.input if i.name in moved]:
        copy.graph.input.remove(info)
        copy.graph.initializer.append(numpy_helper.from_array(feed[info.name], info.name))
    rest = {name: value for name, value in feed.items() if name not in moved}
    return Case(f"{case.name} (constants)", copy, [rest])


def outcomes(case: Case, folder: Path, ways: Sequence[str] = tuple(WAYS)) -> Iterator[tuple]:
    """(way, what became of the model); nothing if onnxruntime does not run it."""
    path = folder / "model.onnx"
    onnx.save(case.model, path)
    try:
        session = open_session(path)
        feeds = list(case.feeds or open_samples(SampleSpec(count=2), input_specs(path), path))
        expected = [run(session, feed) for feed in feeds]
    except QuantError:
        return
    floats = [x for feed in feeds for x in feed.values() if _is_float(x)]
    is_finite = all(np.isfinite(x).all() for x in floats)
    for way in ways:
        if is_finite or "static" not in way:  # samples with NaN are refused
            yield way, outcome(path, feeds, expected, way)


def outcome(path: Path, feeds: list[Feed], expected: list[list[Any]], way: str) -> str:
    """What becomes of the model in that file: "sound", or what is wrong."""
    output = path.with_name("quantized.onnx")
    output.unlink(missing_ok=True)
    config = QuantConfig(**WAYS[way])
    try:
        calibration = feeds if config.mode == "static" else None
        with patch.object(timing, "take_turns", _one_turn):
            quantize_model(path, output, config, calibration=calibration)
    except QuantError as error:
        if "nothing to quantize" in error.problem or "quantized already" in error.problem:
            return "nothing to quantize"
        return f"refused: {error}"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        return f"crashed: {type(error).__name__}: {error} ({place})"
    try:
        session = open_session(output)
        got = [run(session, feed) for feed in feeds]
    except QuantError as error:
        return f"invalid: {error}"
    pairs = zip(expected, got, strict=True)
    found = [_sqnr_db(a, b) for one, two in pairs for a, b in zip(one, two, strict=True)]
    worst, floor = min(found, default=np.inf), config.floor.min
    return "sound" if worst >= floor else f"broken: {worst:.1f} dB"


def _one_turn(calls: Sequence[Callable[[], object]], **options: Any) -> np.ndarray:
    """The shortest race there is: what is right counts here, whichever candidate is called fast."""
    return take_turns(calls, **{**options, "seconds": 0.0, "min_rounds": 1})


def _feed(model: onnx.ModelProto, inputs: Sequence[Any]) -> Feed:
    values = [_value(value) for value in inputs]
    return {info.name: v for info, v in zip(model.graph.input, values, strict=False)}


def _count(folder: Path) -> int:
    return len(list(folder.glob("input_*.pb")))


def _stored(model: onnx.ModelProto, folder: Path, position: int) -> Any:
    """The message in input_POSITION.pb, which is of the type of the model's input."""
    kind = model.graph.input[position].type.WhichOneof("value")
    types = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    message = types.get(str(kind), onnx.TensorProto)()
    message.ParseFromString((folder / f"input_{position}.pb").read_bytes())
    return message


def _value(value: Any) -> Any:
    """An array, or a list of arrays, of a message or of what `onnx.backend.test.case` made."""
    if isinstance(value, onnx.TensorProto):
        value = numpy_helper.to_array(value)
    elif isinstance(value, onnx.SequenceProto):
        value = numpy_helper.to_list(value)
    elif isinstance(value, onnx.OptionalProto):
        value = numpy_helper.to_optional(value)
    if value is None or isinstance(value, (list, dict)):
        return value
    array = np.asarray(value)
    return array.astype(str) if array.dtype == object else array


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def _sqnr_db(expected: Any, got: Any) -> float:
    if not _is_float(expected) or not expected.size:
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


def _tables(counts: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """One row a way, one column an outcome."""
    kinds = ["sound", "nothing to quantize", "refused", "crashed", "invalid", "broken"]
    yield " " * 12 + "".join(f"{kind:>22}" for kind in kinds)
    for way in WAYS:
        yield f"{way:12}" + "".join(f"{counts[way, kind]:>22}" for kind in kinds)


def results(share: int, shares: int, data: Path | None, names: Sequence[str]) -> list[tuple]:
    """(name, way, outcome) of this share of the models, each an equal part of all."""
    cases = [*made_cases(), *stored_cases(INSTALLED)] if data is None else [*stored_cases(data)]
    wanted = [case for case in cases if not names or any(name in case.name for name in names)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for original in wanted[share::shares]:
            for case in filter(None, (original, with_constants(original))):
                found += [(case.name, *row) for row in outcomes(case, Path(folder))]
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="backend")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    started, counts, faults, ran = time.monotonic(), Counter[tuple[str, str]](), [], set()
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        shares = [
            pool.submit(results, share, options.jobs, options.data, options.names)
            for share in range(options.jobs)
        ]
        for name, way, result in (row for share in shares for row in share.result()):
            kind = result.split(":")[0]
            ran.add(name)
            counts[way, kind] += 1
            if kind not in SOUND:
                faults.append(f"{way:12} {name}: {result}")
    for fault in faults:
        print(fault[:400])
    print(f"{len(ran)} models that onnxruntime runs, {time.monotonic() - started:.0f} s")
    print("\n".join(_tables(counts)))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
