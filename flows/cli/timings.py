"""How long models take to run, in whichever runtime, and to load; all as JSON values."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.data.spec import SampleSpec
from quant_core.errors import RequestError

if TYPE_CHECKING:
    from flows.runtime.javascript import Runtime as JavaScript

WEB_SECONDS = 3.0  # of timing: a wasm engine first compiles what is hot


def timer_for(target: str) -> Callable[..., dict[str, Any]] | None:
    """What times a file for that target: onnxruntime here, or another runtime where installed."""
    from flows.runtime.javascript import find_package
    from quant_core.plan.targets import Runtime
    from quant_core.search.prepared import timed_in

    if (runtime := timed_in(target)) is not None:
        return timing if runtime is Runtime.ONNXRUNTIME else openvino_timing
    if target != "web" or shutil.which("node") is None:
        return None
    try:
        find_package("onnxruntime-web")
    except RequestError:
        return None
    return partial(javascript_timing, "wasm", threads=1, batch=1, seconds=WEB_SECONDS)


def timing(
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 0.2,
) -> dict[str, Any]:
    """The latency of both models, and how much of the host others took meanwhile."""
    from quant_core import judging
    from quant_core.worker.host import OtherLoad

    load = OtherLoad(os.getpid())
    timed = judging.benchmark_model(
        original,
        quantized,
        samples,
        threads=threads,
        batch=batch,
        seconds=seconds,
    )
    return timed.to_dict() | load.until_now()


def openvino_timing(
    original: Path, quantized: Path, samples: SampleSpec, seconds: float = 0.2
) -> dict[str, Any]:
    """The latency of both models in OpenVINO, on one thread, and what others took meanwhile."""
    from quant_core.data.for_model import samples_for
    from quant_core.evaluate.in_openvino import race_in_openvino
    from quant_core.worker.host import OtherLoad

    few = replace(samples, labels=None, count=1)
    feed = samples_for(original, few, original, quantized)[0]
    load = OtherLoad(os.getpid())
    return race_in_openvino(original, quantized, feed, seconds).to_dict() | load.until_now()


def javascript_timing(
    runtime: JavaScript,
    original: Path,
    quantized: Path,
    samples: SampleSpec,
    threads: int,
    batch: int,
    seconds: float,
) -> dict[str, Any]:
    """The latency of both models in JavaScript, and how near their outputs there are to Python's.

    control                             speed of the float model over a copy of itself, or None
    float_equal_db, quantized_equal_db  SQNR of the worst output in dB
    """
    from flows.runtime.javascript import race
    from quant_core.data.for_model import samples_for
    from quant_core.evaluate.fidelity import compare
    from quant_core.model.session import open_session, output_names, run
    from quant_core.worker.host import OtherLoad

    drawn = replace(samples, labels=None, count=batch)
    feed = samples_for(original, drawn, original, quantized).batch(batch)
    load = OtherLoad(os.getpid())
    raced = race(runtime, (original, quantized), feed, threads=threads, seconds=seconds)
    row = raced.timing.to_dict() | load.until_now() | {"control": raced.control}
    paths = {"float_equal_db": original, "quantized_equal_db": quantized}
    for (key, path), outputs in zip(paths.items(), raced.outputs, strict=True):
        session = open_session(path)
        names = output_names(session)
        there = [[outputs[name] for name in names]]
        row[key] = compare([run(session, feed)], there, names).sqnr_db
    return row


def footprint(model: Path, samples: SampleSpec, threads: int, batch: int) -> dict[str, Any]:
    """How long a model takes to load in a new process, and how much memory there."""
    from quant_core.worker.run import run_stage, shut_down

    few = replace(samples, labels=None, count=batch)
    request = {"model": str(model), "samples": few.to_dict(), "threads": threads, "batch": batch}
    try:
        return dict(run_stage("footprint", request)["result"])
    finally:
        shut_down()
