"""Start-up and time per model of a batch of 100 models of 1.5 MB.

python -m tests.bench.batch100 [N]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import onnx
import yaml
from onnx import helper

from tests.models import one_graph

WIDTH, LAYERS = 64, 11


def model(seed: int) -> onnx.ModelProto:
    """Eleven Convs of 64 channels with Relu on 16 x 16 pixels, with weights of its own: 1.5 MB."""
    rng = np.random.default_rng(seed)
    weights, nodes, value, channels = {}, [], "x", 3
    for k in range(LAYERS):
        scale = np.float32(np.sqrt(2 / (9 * channels)))
        weights[f"w{k}"] = rng.standard_normal((WIDTH, channels, 3, 3), dtype=np.float32) * scale
        weights[f"b{k}"] = rng.standard_normal(WIDTH, dtype=np.float32) * np.float32(0.1)
        shape = {
            "kernel_shape": [3, 3],
            "pads": [1] * 4,
            "strides": [2, 2] if k in (1, 3) else [1, 1],
        }
        nodes.append(
            helper.make_node("Conv", [value, f"w{k}", f"b{k}"], [f"c{k}"], f"conv{k}", **shape)
        )
        nodes.append(helper.make_node("Relu", [f"c{k}"], [f"r{k}"], f"relu{k}"))
        value, channels = f"r{k}", WIDTH
    weights["head"] = rng.standard_normal((WIDTH, 10), dtype=np.float32)
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["p"], "pool"))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"], "flatten"))
    nodes.append(helper.make_node("MatMul", ["f", "head"], ["y"], "matmul"))
    return one_graph(nodes, weights, input=("n", 3, 16, 16), output=("n", 10))


def main(count: int) -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_inputs(folder, count, 32)
        batch = {"input_dir": "models", "output_dir": "out"}
        (folder / "m.yaml").write_text(
            yaml.safe_dump({"calibration": {"data": "data.npy"}, "batch": batch})
        )

        for home in ("cold", "warm"):  # Prefect's database is new, then not
            start_up, seconds, failed = timed(folder, folder / "prefect")
            speed = f"start-up {start_up:.1f} s, {seconds / count:.2f} s a model"
            print(f"{home}: {speed}, {failed} of {count} failed")
            if home == "cold":
                stages(folder)


def write_inputs(folder: Path, count: int, samples: int) -> None:
    """So many models in `models`, and `data.npy` to calibrate them on."""
    (folder / "models").mkdir()
    for seed in range(count):
        onnx.save(model(seed), folder / "models" / f"model{seed:03d}.onnx")
    np.save(
        folder / "data.npy",
        np.random.default_rng(0).standard_normal((samples, 3, 16, 16), dtype=np.float32),
    )


def timed(folder: Path, home: Path) -> tuple[float, float, int]:
    """Seconds until the first stage could start, seconds from there to the end, failures."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(home)}
    environment.pop("PREFECT_API_URL", None)
    command = [
        sys.executable,
        "-m",
        "flows.batch",
        str(folder / "m.yaml"),
        "--format",
        "json",
        "--force",
    ]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                started = time.monotonic()
    return started - begun, time.monotonic() - started, event["failed"]


def stages(folder: Path) -> None:
    timings = f"{folder}/out/reports/timings/*.parquet"
    rows = duckdb.sql(
        "select stage, avg(seconds), max(peak_bytes) / 1e6"
        f" from read_parquet('{timings}') group by 1 order by 2"
    )
    for stage, seconds, peak in rows.fetchall():
        print(f"    {stage:10} {seconds:.2f} s a model, peak {peak:.0f} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
