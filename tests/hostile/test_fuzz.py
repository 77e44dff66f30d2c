"""Damaged models, manifests and samples are read or refused with a QuantError.

None crashes or hangs.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flows.manifest.read import read_manifest
from quant_core.data.input_spec import InputSpec
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError, RequestError, StageError
from quant_core.worker.run import StageLimits, run_stage, shut_down
from tests.jobs import after_json
from tests.models import sketch, tiny_cnn

# 2,500 in all; QUANTMILL_FUZZ=20 tries twenty times as many.
EXAMPLES = {"models": 600, "yaml": 700, "toml": 300, "npy": 400, "npz": 500}
TIMES = int(os.environ.get("QUANTMILL_FUZZ", "1"))
LONGEST_S = 300.0  # for one input, even on a busy machine: more is a hang
PIECES = [
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\n",
    b"'",
    b"*",
    b"&",
    b"[",
    b"{",
    b": ",
    b"-1",
    b"9" * 30,
    b"\xff" * 9,
]

YAML = b"""\
bits: 8
exclude: [/head/*]
layer_bits: {conv*: 4}
models:
  - input: m.onnx
    output: out/m.onnx
    calibration: &d {data: d.npy, num_samples: 4, shape: [1, 3, 8, 8]}
    evaluation: {<<: *d, labels: l.npy}
    contract: {metric: top1, max_drop: 0.01}
batch: {input_dir: "*.onnx", output_dir: out, jobs: 2}
limits: {timeout_s: 60.0, memory_mb: 500}
"""
TOML = b"""\
bits = 8
exclude = ["/head/*"]
batch = {input_dir = "*.onnx", output_dir = "out"}
[[models]]
input = "m.onnx"
output = "out/n.onnx"
calibration.data = "d.npy"
[models.contract]
metric = "cosine"
min = 0.99
"""


def seeds() -> dict[str, list[bytes]]:
    w = np.ones((3, 4), np.float32)
    branchy = sketch(
        "(float[n, 3] x) => (float[n, 4] y) { h = MatMul(x, w)  y = Add(h, b) }",
        {"w": w, "b": w[0]},
    )
    return {
        "models": [tiny_cnn().SerializeToString(), branchy.SerializeToString()],
        "yaml": [YAML],
        "toml": [TOML],
        "npy": [
            saved(np.save, np.ones((4, 3), np.float32)),
            saved(np.save, np.eye(3, dtype=">i8")),
        ],
        "npz": [
            saved(save, x=np.ones((4, 3), np.float32)) for save in (np.savez, np.savez_compressed)
        ],
    }


def saved(save: Callable, *arrays, **named) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *arrays, **named)
    return buffer.getvalue()


def damaged(kind: str) -> st.SearchStrategy[bytes]:
    """A seed with one to six edits: bytes overwritten, cut out, put in, or doubled."""
    edit = st.tuples(
        st.sampled_from(("write", "cut", "insert", "double", "end")),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.sampled_from(PIECES), st.binary(min_size=1, max_size=8)),
    )
    return st.builds(
        _edited, st.sampled_from(seeds()[kind]), st.lists(edit, min_size=1, max_size=6)
    )


def _edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, piece in edits:
        at = int(place * len(content))
        before, after = content[:at], content[at:]
        content = {
            "write": before + piece + after[len(piece) :],
            "cut": before + after[len(piece) :],
            "insert": before + piece + after,
            "double": before + after[: 8 * len(piece)] + after,
            "end": before or content,
        }[kind]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    onnx.save(tiny_cnn(), folder / "m.onnx")
    np.save(folder / "d.npy", np.ones((4, 3, 8, 8), np.float32))
    np.save(folder / "l.npy", np.zeros(4, np.int64))
    yield folder
    shut_down()


def read_model(path: Path) -> None:
    """Read a model in a child, so that a crash is an error here and does not end the tests.

    A StageError of the child is a failure, but for one: the model may need too much memory.
    """
    try:
        run_stage(
            "load",
            {"path": str(path)},
            StageLimits(timeout_s=LONGEST_S, memory_bytes=1 << 30),
            module="tests.hostile.loading",
        )
    except StageError as error:
        if "out of memory" not in error.problem:
            raise


def read_jobs(path: Path) -> None:
    manifest = read_manifest(path)
    assert after_json(manifest.jobs) == manifest.jobs
    assert manifest.digest()


def read_samples(path: Path) -> None:
    spec = InputSpec("x", np.dtype(np.float32), ("n", 3))
    for feed in open_samples(SampleSpec(path), [spec]):
        assert feed["x"].dtype == np.float32
        assert np.isfinite(feed["x"]).all()


READERS: dict[str, Callable[[Path], None]] = {
    "models": read_model,
    "yaml": read_jobs,
    "toml": read_jobs,
    "npy": read_samples,
    "npz": read_samples,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", READERS)
def test_whatever_is_damaged_is_read_or_refused(folder, kind):
    tried = {"read": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES[kind] * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(kind))
    def fuzz(content: bytes) -> None:
        path = folder / f"damaged.{ {'models': 'onnx'}.get(kind, kind) }"
        path.write_bytes(content)
        before = time.monotonic()
        try:
            READERS[kind](path)
            tried["read"] += 1
        except (ModelError, DataError, RequestError):
            tried["refused"] += 1
        except StageError as error:
            raise AssertionError(f"{content!r} is reported as {error!r}") from error
        assert time.monotonic() - before < LONGEST_S, content

    fuzz()

    assert sum(tried.values()) >= EXAMPLES[kind]
    assert min(tried.values()) > 0  # seeds are damaged, but not beyond all reading
