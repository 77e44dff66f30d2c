"""4-bit weights of quantmill, quantize-rs and onnxruntime's MatMulNBits quantizer on real models.

    python -m tests.bench.int4 --zoo DIR [--cases efficientnet_lite0,...] [--target x86]
                               [--samples 64] [--seconds 1] [--json FILE]

agreement  decisions equal to float's; value and flips where there are labels
file       float bytes over quantized bytes; constants: the same of all constants' values
float x    speed against float, and int8 x against quantmill's static INT8; one thread, CPU time,
           in turns
load       time to load the file beyond that of the float file, in ns per weight

quantize-rs (pip install quantization-rs==0.10) and onnxruntime's quantizer (pip install onnxruntime
onnx-ir) run where they are installed; the latter where there is a MatMul. Every tool gets the same
calibration samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from quant_core.evaluate.timing import measure
from quant_core.model.session import open_session
from tests.bench.accuracy import (
    Job,
    add_tools,
    by_quantize_rs,
    by_quantmill,
    feeds_of,
    load_zoo,
    modern,
)
from tests.bench.size import WIDTHS

INT8 = "quantmill int8 static"
CASES = [
    "crepe_tiny",
    "efficientnet_lite0",
    "magika_v3_3",
    "minilm_movie_sentiment",
    "mnist_resnet",
]
LOADS = 5


def by_onnxruntime_matmul(job: Job) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    model = onnx.load(job.modern)
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    if not any(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node):
        raise ValueError("no MatMul that it takes")
    quantizer.model.save_model_to_file(str(job.output))


TOOLS: dict[str, Callable[[Job], None]] = {
    INT8: partial(by_quantmill, mode="static"),
    "quantmill int8 folded": partial(by_quantmill, mode="weight_only"),
    "quantmill int4 static": partial(by_quantmill, mode="static", bits=4),
    "quantmill int4 folded": partial(by_quantmill, mode="weight_only", bits=4),
    "quantmill int4 auto": partial(by_quantmill, bits=4),
    "quantize-rs int4": partial(by_quantize_rs, bits=4, native_int4=True),
    "onnxruntime MatMulNBits": by_onnxruntime_matmul,
}
COLUMNS = (
    "seconds",
    "agreement",
    "value",
    "flips",
    "sqnr_db",
    "file",
    "constants",
    "float x",
    "int8 x",
    "load",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, required=True)
    parser.add_argument("--cases", type=lambda s: s.split(","), default=CASES)
    add_tools(parser, TOOLS)
    parser.add_argument("--target", default="auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    zoo, rows = load_zoo(args.zoo), []
    print("| case | tool |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for case in zoo.cases(args.zoo):
        if case.name not in args.cases or not case.model.exists():
            continue
        with tempfile.TemporaryDirectory() as scratch:
            for tool in args.tools:
                rows.append(row(zoo, case, tool, args, Path(scratch)))
                cells = (rows[-1].get(c, "") for c in COLUMNS)
                texts = [f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
                print(
                    f"| {case.name} | {tool} |",
                    " | ".join(texts),
                    "|",
                    rows[-1].get("error", ""),
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def row(zoo: Any, case: Any, tool: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What one tool makes of one case; an `error` where it made nothing that runs."""
    made, found = scratch / f"{tool.replace(' ', '_')}.onnx", {"case": case.name, "tool": tool}
    feeds = feeds_of(zoo, case, args.samples, scratch)
    started = time.monotonic()
    try:
        TOOLS[tool](Job(case.model, modern(case.model, scratch), feeds, made, args.target))
        found["seconds"] = time.monotonic() - started
        scores = zoo.evaluate(case, made)
        feed = zoo.load_calibration(case, 1)[0]
        found |= {k: scores[k] for k in ("agreement", "value", "sqnr_db")}
        found["flips"] = (
            f"-{scores['flips_bad']} +{scores['flips_good']}"
            if scores["flips_bad"] is not None
            else ""
        )
        found["file"] = case.model.stat().st_size / made.stat().st_size
        found["constants"] = constants(case.model)[0] / constants(made)[0]
        found["float x"] = faster(case.model, made, feed, args.seconds)
        rival = scratch / f"{INT8.replace(' ', '_')}.onnx"
        found["int8 x"] = faster(rival, made, feed, args.seconds) if rival.exists() else ""
        found["load"] = (
            1e9 * (load_seconds(made) - load_seconds(case.model)) / constants(case.model)[1]
        )
    # Whatever a tool raises is its result; a Rust panic is no Exception.
    except BaseException as problem:
        if isinstance(problem, KeyboardInterrupt):
            raise
        found["error"] = f"{type(problem).__name__}: {str(problem).strip()[:120]}"
    return found


def faster(first: Path, second: Path, feed: dict[str, np.ndarray], seconds: float) -> float:
    """How many times the second model is as fast as the first."""
    sessions = open_session(first), open_session(second)
    return measure(*sessions, feed, seconds=seconds, clock=time.thread_time).speedup


def load_seconds(path: Path) -> float:
    """The least of a few."""
    taken = []
    for _ in range(LOADS):
        started = time.thread_time()
        open_session(path)
        taken.append(time.thread_time() - started)
    return min(taken)


def constants(path: Path) -> tuple[int, int]:
    """Bytes of all constants' values, and how many values they are."""
    graph = onnx.load(path).graph
    nodes = [n for n in graph.node if n.op_type == "Constant"]
    tensors = [*graph.initializer, *(a.t for n in nodes for a in n.attribute if a.name == "value")]
    sizes = [int(np.prod(t.dims)) for t in tensors]
    kinds = [onnx.TensorProto.DataType.Name(t.data_type).lower() for t in tensors]
    return sum(-(-WIDTHS.get(k, 64) * n // 8) for k, n in zip(kinds, sizes, strict=True)), sum(
        sizes
    )


if __name__ == "__main__":
    main()
