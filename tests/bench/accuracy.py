"""Accuracy, speed and size of real models, quantized by quantmill and by other tools.

    python -m tests.bench.accuracy --zoo DIR [--cases NAME,...] [--tools NAME,...]
                                   [--target x86] [--samples 64] [--seconds 2] [--threads 1]
                                   [--json FILE] [--keep FOLDER] [--emulate-avx2]

DIR holds zoo.py and one folder per case: a float model, calibration and evaluation data, labels.
Every tool gets the same calibration feeds and no option that is set for one model. Models below
opset 13 are converted to 17 for onnxruntime's tools, which otherwise refuse them or write files
that do not load. Each tool runs in its own process, with a memory and a time limit.

A cell reads `value @speed / SQNR in dB / file size over float's, -broken +repaired decisions`; - if
the tool refused or crashed, ! if its file does not load. Speed is float time over quantized time at
batch 1, in turns in one process; with one thread it is CPU time, so that other work on the machine
does not count. With --json, results are kept between runs: a new result replaces the old one.
--emulate-avx2 adds `AVX2:` the value and SQNR where int8 products saturate (AVX2 without VNNI;
needs qemu-x86_64, slow).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import pickle
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.evaluate.timing import measure
from quant_core.model.session import open_session
from quant_core.plan.targets import host_target_name

MEMORY_BYTES = (
    12 << 30
)  # one tool on one model; keeping every activation of every sample takes more
SECONDS = 1800
NOISE = 0.03  # of a speed
LUCK = {"sqnr_db": 0.5}  # differences of a value that say nothing
LUCK_OF_SHARES = 0.001


@dataclass(frozen=True, slots=True)
class Job:
    """One model for one tool, with feeds as .npz files.

    `model` is as it came; `modern` has opset 17 if that one is below 13.
    """

    model: Path
    modern: Path
    feeds: Path
    output: Path
    target: str


def by_quantmill(job: Job, **config: Any) -> None:
    quantize_model(
        job.model, job.output, QuantConfig(target=job.target, **config), calibration=job.feeds
    )


def by_onnxruntime_static(job: Job, method: str = "MinMax", **options: Any) -> None:
    from onnxruntime.quantization import CalibrationMethod, quantize_static

    method = getattr(CalibrationMethod, method)
    quantize_static(
        _processed(job), job.output, Reader(job.feeds), calibrate_method=method, **options
    )


def by_onnxruntime_dynamic(job: Job, **options: Any) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        _processed(job), job.output, per_channel=True, weight_type=QuantType.QInt8, **options
    )


def by_quantize_rs(job: Job, **options: Any) -> None:
    import quantize_rs  # pip install quantization-rs==0.10

    quantize_rs.quantize(str(job.model), str(job.output), per_channel=True, **options)


def by_quantize_rs_calibrated(job: Job) -> None:
    import quantize_rs

    feeds = [dict(np.load(path)) for path in sorted(job.feeds.glob("*.npz"))]
    if len(feeds[0]) > 1:
        raise ValueError("takes models with one input only")
    model, data, fixed = (
        onnx.load(job.modern),
        job.output.with_suffix(".npy"),
        job.output.with_suffix(".fixed"),
    )
    ((name, first),) = feeds[0].items()
    np.save(data, np.concatenate([feed[name] for feed in feeds]))
    shape = next(i for i in model.graph.input if i.name == name).type.tensor_type.shape
    free = onnx.TensorShapeProto.FromString(shape.SerializeToString())
    for dim, size in zip(shape.dim, first.shape, strict=True):
        dim.dim_value = size  # it takes fixed shapes only, and evaluation has batches
    onnx.save(model, fixed)
    quantize_rs.quantize_with_calibration(
        str(fixed), str(job.output), calibration_data=str(data), per_channel=True
    )
    made = onnx.load(job.output)
    next(i for i in made.graph.input if i.name == name).type.tensor_type.shape.CopyFrom(free)
    del made.graph.value_info[:]
    for output, old in zip(made.graph.output, onnx.load(job.modern).graph.output, strict=True):
        output.CopyFrom(old)
    onnx.save(made, job.output)


def _x86() -> dict[str, Any]:
    """What onnxruntime's documentation advises for x86."""
    from onnxruntime.quantization import QuantType

    return {
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    }


TOOLS: dict[str, Callable[[Job], None]] = {
    "quantmill": by_quantmill,
    "quantmill-int4": partial(by_quantmill, bits=4),
    "ort": lambda job: by_onnxruntime_static(job, **_x86()),
    "ort-reduce-range": lambda job: by_onnxruntime_static(job, reduce_range=True, **_x86()),
    "ort-default": by_onnxruntime_static,
    "ort-percentile": lambda job: by_onnxruntime_static(job, "Percentile", **_x86()),
    "ort-dynamic": by_onnxruntime_dynamic,
    "ort-dynamic-reduce": partial(by_onnxruntime_dynamic, reduce_range=True),
    "quantize-rs-int8": partial(by_quantize_rs, bits=8),
    "quantize-rs-int4": partial(by_quantize_rs, bits=4, native_int4=True),
    "quantize-rs-calibrated": by_quantize_rs_calibrated,
}


class Reader:
    """The feeds of a folder, as onnxruntime's calibrators ask for them."""

    def __init__(self, folder: Path) -> None:
        self.left: Iterator[Path] = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> dict[str, np.ndarray] | None:
        path = next(self.left, None)
        return None if path is None else dict(np.load(path))


def add_tools(parser: argparse.ArgumentParser, tools: Collection[str]) -> None:
    """The option --tools: some of these, all by default. An unknown name ends the command."""

    def named(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(tools):
            raise argparse.ArgumentTypeError(f"no {min(unknown)} among {', '.join(tools)}")
        return names

    parser.add_argument("--tools", type=named, default=list(tools), help=", ".join(tools))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--cases", type=lambda s: s.split(","), help="all that are stored")
    add_tools(parser, TOOLS)
    parser.add_argument("--target", default="auto", help="of quantmill's files")
    parser.add_argument("--samples", type=int, default=64, help="calibration samples, at most")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="results, read first if there")
    parser.add_argument("--keep", type=Path, help="folder for the quantized models")
    parser.add_argument("--emulate-avx2", action="store_true")
    args = parser.parse_args()
    zoo = load_zoo(args.zoo)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for case in zoo.cases(args.zoo):
        if (args.cases and case.name not in args.cases) or not case.model.exists():
            continue
        row = results.setdefault(case.name, {"metric": case.metric, "tools": {}})
        with tempfile.TemporaryDirectory(prefix="quantmill-bench-") as scratch:
            for tool in args.tools:
                started = time.monotonic()
                row["tools"][tool] = cell = measured(zoo, case, tool, args, Path(scratch))
                row["float"] = cell.get("fp32", row.get("float"))
                took = time.monotonic() - started
                print(
                    f"{case.name} {tool}: {text(cell)}  [{took:.0f} s] {cell.get('error', '')}",
                    file=sys.stderr,
                )
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))
    print(f"{processor()}, {host_target_name()}, onnxruntime {ort.__version__}\n")
    print(table(results, args.cases))
    print(table_of_verdicts(results, args.cases))


def measured(
    zoo: ModuleType, case: Any, tool: str, args: argparse.Namespace, scratch: Path
) -> dict[str, Any]:
    """The file that a tool makes of a case, scored and timed; with an `error` if it failed."""
    folder = args.keep / case.name if args.keep else scratch
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(
        case.model,
        modern(case.model, scratch),
        feeds_of(zoo, case, args.samples, scratch),
        folder.absolute() / f"{tool}.onnx",
        args.target,
    )
    started = time.monotonic()
    if error := in_own_process(tool, job):
        return {"outcome": "-", "error": error}
    cell: dict[str, Any] = {"outcome": "ok", "seconds": time.monotonic() - started}
    cell["size_ratio"] = job.output.stat().st_size / case.model.stat().st_size
    try:
        cell |= zoo.evaluate(case, job.output)
        first, second = (
            open_session(path, threads=args.threads) for path in (case.model, job.output)
        )
        clock = time.thread_time if args.threads == 1 else time.perf_counter
        feed = zoo.load_calibration(case, 1)[0]
        cell["timing"] = measure(first, second, feed, seconds=args.seconds, clock=clock).to_dict()
        if args.emulate_avx2:
            cell["avx2"] = evaluate_emulated(zoo, case, job.output, args.zoo)
    except (
        Exception
    ) as problem:  # whatever a broken file makes onnxruntime raise is the result here
        return cell | {"outcome": "!", "error": _line(problem)}
    return cell


def in_own_process(tool: str, job: Job) -> str:
    """What went wrong, empty if the output is there."""
    job.output.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(tool, job))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        return f"not done after {SECONDS} s"
    failure = job.output.with_suffix(".error")
    if failure.exists():
        return failure.read_text()
    return "" if job.output.exists() else f"died, exit code {process.exitcode}"


def _child(tool: str, job: Job) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    os.chdir(job.output.parent)  # onnxruntime's tools leave files where they run
    failure = job.output.with_suffix(".error")
    failure.unlink(missing_ok=True)
    try:
        TOOLS[tool](job)
    except BaseException as problem:  # a Rust panic is no Exception
        failure.write_text(_line(problem))


def modern(model: Path, scratch: Path) -> Path:
    """The model; converted to opset 17 if it is below 13 and can be converted."""
    path = scratch / "modern.onnx"
    if path.exists():
        return path
    loaded = onnx.load(model)
    if next(o.version for o in loaded.opset_import if o.domain in ("", "ai.onnx")) >= 13:
        return model
    try:
        onnx.save(onnx.version_converter.convert_version(loaded, 17), path)
    except Exception:  # the converter raises whatever it likes
        shutil.copyfile(model, path)
    return path


def feeds_of(zoo: ModuleType, case: Any, samples: int, scratch: Path) -> Path:
    folder = scratch / "feeds"
    if not folder.exists():
        folder.mkdir()
        for i, feed in enumerate(zoo.load_calibration(case, samples)):
            np.savez(folder / f"{i:05d}.npz", **feed)
    return folder


def _processed(job: Job) -> Path:
    """The model after the steps of onnxruntime's documented preparation that work for it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = job.output.with_suffix(".prepared")
    for without_shapes in (
        False,
        True,
    ):  # "incomplete symbolic shape inference": users leave that out
        try:
            quant_pre_process(job.modern, path, skip_symbolic_shape=without_shapes)
        except Exception:  # it raises whatever it likes
            continue
        return path
    return job.modern


def evaluate_emulated(zoo: ModuleType, case: Any, path: Path, root: Path) -> dict[str, Any]:
    """The score of a file on a CPU with AVX2 without VNNI, against the float model on this CPU."""
    zoo.evaluate(case, case.model)  # the reference, remembered
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "outputs")
        code = "import pickle, sys; sys.path.insert(0, sys.argv[1]); import zoo\n"
        code += "pickle.dump(zoo.run(zoo.Case(sys.argv[2]), sys.argv[3]), open(sys.argv[4], 'wb'))"
        command = [
            "qemu-x86_64",
            "-cpu",
            "Haswell",
            sys.executable,
            "-c",
            code,
            *map(str, (root, case.folder, path, out)),
        ]
        subprocess.run(command, check=True, capture_output=True)  # qemu warns a lot
        outputs = pickle.loads(out.read_bytes())
    run, zoo.run = zoo.run, lambda *_: outputs
    try:
        return dict(zoo.evaluate(case, path))
    finally:
        zoo.run = run


def load_zoo(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", folder / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table(results: dict[str, Any], cases: list[str] | None = None) -> str:
    """Markdown, one row a case."""
    results = {name: row for name, row in results.items() if not cases or name in cases}
    tools = [tool for tool in TOOLS if any(tool in row["tools"] for row in results.values())]
    lines = [f"| case | metric | float | {' | '.join(tools)} |", "|---" * (3 + len(tools)) + "|"]
    for name, row in results.items():
        cells = " | ".join(text(row["tools"].get(tool)) for tool in tools)
        lines.append(f"| {name} | {row['metric']} | {_short(row.get('float'))} | {cells} |")
    return "\n".join(lines) + "\n"


def text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["outcome"] != "ok":
        return str(cell["outcome"])
    value, speed, sqnr = (
        _short(cell["value"]),
        cell["timing"]["speedup"],
        _short(cell["sqnr_db"], 2),
    )
    text = f"{value} @{speed:.2f} / {sqnr} / {cell['size_ratio']:.2f}"
    if cell["flips_bad"] is not None:
        text += f", -{cell['flips_bad']} +{cell['flips_good']}"
    if "avx2" in cell:
        text += f", AVX2: {_short(cell['avx2']['value'])} / {cell['avx2']['sqnr_db']:.0f}"
    return text


def table_of_verdicts(results: dict[str, Any], cases: list[str] | None = None) -> str:
    """Markdown: what quantmill loses, and the files of onnxruntime that dominate quantmill's."""
    lines = [
        "| case | loss in points | speed | as right or better and faster |",
        "|---|---|---|---|",
    ]
    for name, row in results.items():
        own = row["tools"].get("quantmill")
        if own is None or (cases and name not in cases):
            continue
        if own["outcome"] != "ok":
            lines.append(f"| {name} | {own['outcome']} | {own['error']} | |")
            continue
        loss = (
            "-"
            if row["metric"] in ("sqnr_db", "agreement")
            else f"{100 * (own['fp32'] - own['value']):.2f}"
        )
        luck = LUCK.get(row["metric"], LUCK_OF_SHARES)
        better = [
            tool
            for tool, cell in row["tools"].items()
            if tool.startswith("ort") and dominates(cell, own, luck)
        ]
        lines.append(f"| {name} | {loss} | {own['timing']['speedup']:.2f} | {', '.join(better)} |")
    return "\n".join(lines) + "\n"


def dominates(other: dict[str, Any], own: dict[str, Any], luck: float) -> bool:
    """Whether `other` is as right and clearly faster, or clearly righter and as fast."""
    if other["outcome"] != "ok":
        return False
    ratio, more = (
        other["timing"]["speedup"] / own["timing"]["speedup"],
        other["value"] - own["value"],
    )
    return bool((more >= -luck and ratio > 1 + NOISE) or (more > luck and ratio > 1 - NOISE))


def _short(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def processor() -> str:
    """Its name, as Linux reports it."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names = [
        line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def _line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"


if __name__ == "__main__":
    main()
