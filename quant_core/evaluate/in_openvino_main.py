"""The process in which OpenVINO runs models, for `in_openvino.py`: the only one that imports it.

Its request is request.json in a folder, its answer answer.json and outputs.npz there.
Before each step doing.json says what that is, for the case that it is the last.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from quant_core.evaluate.timing import take_turns

ONE_THREAD = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
WARM_RUNS = 10  # before kernels are timed: the first of them allocate memory
PROFILED_RUNS = 50  # at least, and as many more as fit into PROFILED_S
PROFILED_S = 0.5
# After another model's runs a small one finds cold caches: of ppocrv2_cls the first run takes twice
# as long as the fourth, at 1.1x of float's speed and not at 1.3x. So each runs for so many seconds
# before the other does, and so many times while kernels are timed.
BLOCK_S = 0.02
BLOCK_RUNS = 10
# OpenVINO's own addition to the name of a Conv without its bias.
WITHOUT_BIAS = "/WithoutBiases"


def main(name: str) -> None:
    """Answer the request in that folder."""
    folder = Path(name)
    request = json.loads(Path(folder, "request.json").read_text(encoding="utf-8"))
    try:
        answer = _Work(folder, openvino.Core()).answer(request)
    except RuntimeError as error:  # OpenVINO raises no other
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        answer = {"problem": (lines or ["no reason given"])[-1][:200]}
    Path(folder, "answer.json").write_text(json.dumps(answer), encoding="utf-8")


class _Work:
    """A request that is being answered."""

    def __init__(self, folder: Path, core: Any) -> None:
        self.folder = folder
        self.core = core

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["export"]:
            source, output = request["export"]
            self.begin("read", source)
            openvino.save_model(self.core.read_model(source), output, compress_to_fp16=False)
        paths, feeds = request["models"], list(self.feeds(request["feeds"]))
        compiled = [self.compiled(path, request["profiles"]) for path in paths]
        arrays: list[Any] = []
        found: list[list[list[int]]] = []
        for path, model in zip(paths, compiled, strict=True):
            self.begin("run", path)
            numbers = []
            for feed in feeds:
                outputs = model(feed)
                numbers.append([len(arrays) + i for i in range(len(model.outputs))])
                arrays += [np.array(outputs[output]) for output in model.outputs]
            found.append(numbers)
        np.savez(self.folder / "outputs.npz", *arrays)
        times = []
        if request["seconds"]:
            calls = [ready.infer for ready in _requests(compiled, feeds[0])]
            seconds, clock = request["seconds"], time.process_time
            rounds = take_turns(calls, seconds=seconds, clock=clock, block_seconds=BLOCK_S)
            times = rounds.tolist()
        taken: list[dict[str, float]] = [{} for _ in compiled]
        if request["profiles"]:
            taken = _milliseconds(compiled, feeds[0])
        kernels = [list(_kernels(model, ms)) for model, ms in zip(compiled, taken, strict=True)]
        return {"found": found, "times": times, "kernels": kernels}

    def begin(self, verb: str, path: str) -> None:
        """Note what comes next."""
        Path(self.folder, "doing.json").write_text(json.dumps([verb, path]), encoding="utf-8")

    def feeds(self, names: list[list[str]]) -> Iterator[dict[str, Any]]:
        with np.load(self.folder / "feeds.npz") as arrays:
            at = 0
            for of_feed in names:
                yield {name: arrays[f"arr_{at + i}"] for i, name in enumerate(of_feed)}
                at += len(of_feed)

    def compiled(self, path: str, profiled: bool) -> Any:
        self.begin("read", path)
        model = self.core.read_model(path)
        self.begin("compile", path)
        return self.core.compile_model(model, "CPU", ONE_THREAD | {"PERF_COUNT": profiled})


def _requests(models: list[Any], feed: dict[str, Any]) -> list[Any]:
    """A request for each model that has its inputs, so that `infer()` takes what the model takes.

    What Python needs to hand inputs over is as long as some models run. OpenVINO's benchmark_app
    leaves it out, too.
    """
    requests = [model.create_infer_request() for model in models]
    for request in requests:
        request.infer(feed)
    return requests


def _milliseconds(models: list[Any], feed: dict[str, Any]) -> list[dict[str, float]]:
    """Kernel -> its time, for each model.

    They take turns, so that what else the host does slows all of them alike. OpenVINO reports the
    mean of all runs since the model was compiled, in whole microseconds: that of the first runs is
    taken off again.
    """
    requests = _requests(models, feed)
    _run_each(requests, WARM_RUNS)
    warm = [_mean_us(request) for request in requests]
    runs = 0
    end = time.monotonic() + PROFILED_S * len(models)
    while runs < PROFILED_RUNS or time.monotonic() < end:
        _run_each(requests, BLOCK_RUNS)
        runs += BLOCK_RUNS
    before = 1 + WARM_RUNS
    found = []
    for request, first in zip(requests, warm, strict=True):
        totals = {name: us * (before + runs) for name, us in _mean_us(request).items()}
        found.append({n: (us - before * first.get(n, 0.0)) / runs for n, us in totals.items()})
    return [{name: max(us, 0.0) / 1e3 for name, us in of_model.items()} for of_model in found]


def _run_each(requests: list[Any], runs: int) -> None:
    for request in requests:
        for _ in range(runs):
            request.infer()


def _mean_us(request: Any) -> dict[str, float]:
    """Kernel -> microseconds, the mean of all runs of its model."""
    profile = request.get_profiling_info()
    return {info.node_name: info.real_time.total_seconds() * 1e6 for info in profile}


def _kernels(model: Any, ms: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The kernels of a compiled model, in its order; `layers` are the names of the file's nodes."""
    for node in model.get_runtime_model().get_ordered_ops():
        info, name = node.get_rt_info(), node.get_friendly_name()
        yield {
            "name": name,
            "kind": _text(info, "layerType"),
            "precision": _text(info, "runtimePrecision"),
            "layers": _text(info, "originalLayersNames").replace(WITHOUT_BIAS, ""),
            "ms": ms.get(name, 0.0),
        }


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""
