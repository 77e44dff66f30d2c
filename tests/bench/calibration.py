"""CPU time of calibration beside bare inference, and its memory for few and for many samples.

    python -m tests.bench.calibration [--model FILE --data FOLDER] [--samples 64] [--rounds 3]
                                      [--memory 32,512] [--json FILE]

Without --model, the models are a network like MobileNet on 224 x 224 images and a residual one,
with random weights and samples. Bare inference is onnxruntime's default session, one thread and the
same samples, which are in memory. The ratio of wall times is what a user waits (on an idle machine:
while one sample is counted, inference of the next goes on); the ratio of CPU times is what
calibration costs where all cores are busy. Memory is the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_ir import to_proto

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session
from quant_core.search.first_plan import first_plan

Feed = dict[str, np.ndarray]


class Network:
    """Builds a CNN with random weights (He); one method per operator returns its output's name."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        x: str,
        n: int,
        out: int,
        kernel: int = 1,
        stride: int = 1,
        group: int = 1,
        relu: bool = True,
    ) -> str:
        pads, both = [kernel // 2] * 4, [stride] * 2
        inputs = (x, self.weight(out, n // group, kernel, kernel))
        y = self.add(
            "Conv", *inputs, kernel_shape=[kernel] * 2, strides=both, pads=pads, group=group
        )
        return self.add("Relu", y) if relu else y

    def save(self, x: str, channels: int, path: Path) -> Path:
        """With a classifier of 1000 classes behind `x`."""
        flat = self.add("Flatten", self.add("GlobalAveragePool", x))
        y = self.add("Gemm", flat, self.weight(1000, channels), transB=1)
        given = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])
        made = helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", 1000])
        graph = helper.make_graph(self.nodes, "network", [given], [made], self.weights)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
            path,
        )
        return path


def mobile(path: Path) -> Path:
    """Inverted residuals as in MobileNetV2: many channels and little arithmetic to hide behind."""
    net, n = Network(), 32
    x = net.conv("image", 3, n, 3, 2)
    for widen, out, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for i in range(repeats):
            y = net.conv(x, n, n * widen) if widen > 1 else x
            y = net.conv(y, n * widen, n * widen, 3, 1 if i else stride, n * widen)
            y = net.conv(y, n * widen, out, relu=False)
            x, n = (net.add("Add", x, y) if i else y), out
    return net.save(net.conv(x, n, 1280), 1280, path)


def residual(path: Path) -> Path:
    """Basic blocks as in ResNet-18."""
    net, n = Network(), 64
    x = net.add(
        "MaxPool", net.conv("image", 3, n, 7, 2), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4
    )
    for out, stride in (
        (64, 1),
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        (512, 1),
    ):
        y = net.conv(net.conv(x, n, out, 3, stride), out, out, 3, relu=False)
        x, n = (
            net.add(
                "Relu",
                net.add("Add", y, x if n == out else net.conv(x, n, out, 1, stride, relu=False)),
            ),
            out,
        )
    return net.save(x, n, path)


NETWORKS: dict[str, Callable[[Path], Path]] = {"mobile 224": mobile, "residual 224": residual}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", help="as quantmill takes it; random samples without")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--memory", type=lambda s: [int(n) for n in s.split(",")], default=[32, 512]
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--peak", type=int, help=argparse.SUPPRESS
    )  # only this many samples, and tell the memory
    args = parser.parse_args()
    if args.peak:
        observed(args.model, args.data, args.peak)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    with tempfile.TemporaryDirectory() as folder:
        made = [(name, make(Path(folder, f"{name}.onnx"))) for name, make in NETWORKS.items()]
        rows = [
            row(name, path, args)
            for name, path in ([(args.model.name, args.model)] if args.model else made)
        ]
    few, many = args.memory
    print(f"| model | inference, ms a sample | wall | CPU | MB for {few} | for {many} | ratio |")
    print("|---" * 7 + "|")
    for r in rows:
        wall, cpu, (first, last) = r["wall"], r["cpu"], r["peak_mb"]
        times = f"{r['inference_ms']:.1f} | {wall:.2f}x | {cpu:.2f}x"
        print(f"| {r['model']} | {times} | {first:.0f} | {last:.0f} | {last / first:.3f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


def row(name: str, path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of each ratio, calibration after inference in each."""
    samples = feeds(path, args.data, args.samples)
    model, plan = planned(path, samples)
    session, samples = open_session(path), list(samples)
    ratios, inference = [], []
    for _ in range(args.rounds):
        bare = timed(lambda: [session.run(None, feed) for feed in samples])
        ratios.append(timed(lambda: observe(model, plan, samples)) / bare)
        inference.append(bare[0])
    wall, cpu = np.median(ratios, axis=0)
    peaks = [peak_mb(path, args, n) for n in args.memory]
    ms = float(np.median(inference)) / len(samples) * 1e3
    return {
        "model": name,
        "inference_ms": ms,
        "wall": float(wall),
        "cpu": float(cpu),
        "peak_mb": peaks,
    }


def feeds(path: Path, data: str | None, count: int) -> Samples:
    return open_samples(
        SampleSpec(Path(data) if data else "random", count=count), input_specs(path)
    )


def planned(path: Path, samples: Samples) -> tuple[bytes, Any]:
    model = prepare(path, [samples[0]])
    return to_proto(model).SerializeToString(), first_plan(model, QuantConfig(), measured=True)


def observed(path: Path, data: str | None, count: int) -> None:
    samples = feeds(path, data, count)
    observe(*planned(path, samples), repeated(samples, count))


def repeated(samples: Samples, count: int) -> Iterator[Any]:
    """So many feeds, read again and again where the data has fewer."""
    return (samples[i % len(samples)] for i in range(count))


def peak_mb(path: Path, args: argparse.Namespace, count: int) -> float:
    """Of a fresh process that calibrates on so many samples."""
    command = [
        sys.executable,
        "-m",
        "tests.bench.calibration",
        "--model",
        str(path),
        "--peak",
        str(count),
    ]
    command += ["--data", args.data] if args.data else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def timed(work: Callable[[], object]) -> np.ndarray:
    """(wall, CPU of all threads) in seconds."""
    started = np.array([time.perf_counter(), time.process_time()])
    work()
    return np.array([time.perf_counter(), time.process_time()]) - started


if __name__ == "__main__":
    main()
