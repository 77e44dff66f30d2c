"""Memory and time that models above 2 GB take to quantize, and whether the result is right.

    python -m tests.bench.large --folder DIR [--gigabytes 2.4]
                                [--ways weight_only,int4,dynamic,raced]

peak  the process's peak memory, mapped files counted, over the float model's size
db    SQNR of the outputs against float's
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from quant_core.model.session import open_session
from tests.models import sketch

WIDTH = 4096
WAYS = {
    "weight_only": {"mode": "weight_only"},
    "int4": {"mode": "weight_only", "bits": 4},
    "dynamic": {"mode": "dynamic"},
    "partly": {
        "mode": "weight_only",
        "exclude": ["m*[1-9]"],
    },  # what stays float is above 2 GB itself
    "float16": {"layer_bits": {"*": 16}},
    "raced": {"calibration_data": "samples.npy"},
}
# VmHWM, as ru_maxrss begins with the memory of the process that forked
QUANTIZE = """
import json, re, sys, time
from pathlib import Path
from quant_core import quantize, quantize_with_calibration
options = json.loads(sys.argv[3])
make = quantize_with_calibration if "calibration_data" in options else quantize
size = make(sys.argv[1], sys.argv[2], **options).size_bytes
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(size, 1024 * int(peak), time.process_time())
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="with room for three times the model"
    )
    parser.add_argument("--gigabytes", type=float, default=2.4)
    parser.add_argument(
        "--ways", type=lambda s: s.split(","), default=list(WAYS), help=", ".join(WAYS)
    )
    args = parser.parse_args()
    os.environ["TMPDIR"] = str(args.folder)
    x = np.random.default_rng(1).standard_normal((2, WIDTH), np.float32)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        path, made = Path(scratch, "float.onnx"), Path(scratch, "made.onnx")
        np.save(Path(scratch, "samples.npy"), np.concatenate([x, -x]))
        float_bytes = write_float(path, round(args.gigabytes * 1e9 / 4 / WIDTH**2))
        (exact,) = open_session(path).run(None, {"x": x})
        print(f"| way ({float_bytes / 1e9:.2f} GB) | peak | cpu s | size | files | db |")
        print("|---" * 6 + "|")
        for way in args.ways:
            child = [sys.executable, "-c", QUANTIZE, str(path), str(made), json.dumps(WAYS[way])]
            printed = subprocess.run(
                child, check=True, cwd=scratch, stdout=subprocess.PIPE, text=True
            ).stdout
            size, peak, seconds = map(float, printed.split())
            (y,) = open_session(made).run(None, {"x": x})
            noise = np.square(y - exact, dtype=np.float64).sum() or 1e-30
            db = 10 * np.log10(np.square(exact, dtype=np.float64).sum() / noise)
            files = len(list(made.parent.glob(f"{made.name}*")))
            costs = f"{peak / float_bytes:.2f} | {seconds:.0f} | {size / float_bytes:.3f}"
            print(f"| {way} | {costs} | {files} | {db:.1f} |")
            for file in made.parent.glob(f"{made.name}*"):
                file.unlink()


def write_float(path: Path, layers: int) -> int:
    """A stack of MatMuls whose weights are written one after the other; its bytes."""
    chain = " ".join(
        f"m{i} = MatMul({f'r{i - 1}' if i else 'x'}, w{i}) r{i} = Relu(m{i})" for i in range(layers)
    )
    model = sketch(
        f"(float[n,{WIDTH}] x) => (float[n,{WIDTH}] y) {{ {chain} y = Identity(r{layers - 1}) }}"
    )
    rng, size = np.random.default_rng(0), 4 * WIDTH**2
    with path.with_suffix(".data").open("wb") as file:
        for i in range(layers):
            file.write(
                (
                    rng.standard_normal((WIDTH, WIDTH), np.float32) * np.float32((2 / WIDTH) ** 0.5)
                ).tobytes()
            )
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=(WIDTH, WIDTH))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (
                ("location", path.with_suffix(".data").name),
                ("offset", i * size),
                ("length", size),
            ):
                tensor.external_data.add(key=key, value=str(value))
            model.graph.initializer.append(tensor)
    onnx.save(model, path)
    return path.stat().st_size + layers * size


if __name__ == "__main__":
    main()
