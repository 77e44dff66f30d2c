"""What a store adds per model: the same batch of tiny models on local files and in an S3 store.

python -m tests.bench.stores [MODELS]    (with the extra `test`: moto's server on loopback)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import onnx
import yaml

from tasks import stores
from tasks.locations import Url
from tests.bench.thousand import timed
from tests.models import tiny_cnn
from tests.store import BUCKET, credentials

MOST_MS = 100
STORE = Url(f"s3://{BUCKET}")


def main(count: int) -> int:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for seed in range(count):
            path = folder / "models" / f"m{seed:05d}.onnx"
            path.parent.mkdir(exist_ok=True)
            onnx.save(tiny_cnn(seed=seed), path)
        time.sleep(1.1)  # until the last model counts as complete
        local, cpu = overhead_ms(folder, count, {"input_dir": "models", "output_dir": "out"})
        print(f"local files: overhead {local:.1f} ms a model, coordinator CPU {cpu:.1f} ms")
        with subprocess.Popen(
            [sys.executable, "-m", "tests.store"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as server:
            assert server.stdout is not None
            assert server.stdin is not None
            os.environ |= credentials(server.stdout.readline().strip())
            os.environ["QUANTMILL_CACHE"] = str(folder / "cache")
            for path in (folder / "models").iterdir():
                stores.upload(path, STORE / "models" / path.name, 60.0)
            batch = {"input_dir": f"{STORE}/models", "output_dir": f"{STORE}/out"}
            remote, cpu = overhead_ms(folder, count, batch | {"work_dir": "work"})
            server.stdin.close()
        print(f"in a store:  overhead {remote:.1f} ms a model, coordinator CPU {cpu:.1f} ms")
        print(f"a store adds {remote - local:.1f} ms a model (at most {MOST_MS})")
        return int(remote - local > MOST_MS)


def overhead_ms(folder: Path, count: int, batch: Mapping[str, Any]) -> tuple[float, float]:
    """Milliseconds of a batch per model beyond its stages, and of the coordinator's CPU.

    They count from when the first stage can start.
    """
    values = {
        "mode": "weight_only",
        "benchmark": {"seconds": 0},
        "evaluation": {"data": "random", "num_samples": 2},
        "batch": dict(batch),
    }
    (folder / "m.yaml").write_text(yaml.safe_dump(values))
    seconds, workers, _, cpu_s = timed(folder)
    reports = folder / batch.get("work_dir", batch["output_dir"]) / "reports"
    query = f"select sum(seconds) from read_parquet('{reports}/timings/*.parquet')"
    (stages,) = duckdb.sql(query).fetchall()[0]
    return 1000 * (seconds - stages / workers) / count, 1000 * cpu_s / count


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
