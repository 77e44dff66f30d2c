"""The name of a result changes with all that decides it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from flows.batch.digests import job_digest
from flows.batch.to_do import largest_first
from flows.manifest.jobs import Job
from quant_core.config import Contract, QuantConfig
from tests.models import tiny_cnn


@pytest.fixture
def job(tmp_path):
    onnx.save(tiny_cnn(), tmp_path / "m.onnx")
    os.utime(tmp_path / "m.onnx", (1e9, 1e9))  # complete
    contract = Contract("words.errors:rate", min=0.5)
    output = tmp_path / "out.onnx"
    return Job("m", tmp_path / "m.onnx", output, QuantConfig(), None, None, contract)


@pytest.mark.parametrize("place", ["words/errors.py", "words/inner/more.py", "words.py"])
def test_the_code_of_a_metric_is_part_of_what_made_a_result(job, tmp_path, place):
    path = tmp_path / "code" / place
    path.parent.mkdir(parents=True)
    digests = set()

    for text in ("def rate(o, l): return 1", "def rate(o, l): return 0.5"):
        path.write_text(text)
        digests.add(job_digest(job, str(tmp_path / "code")))
        Path(tmp_path / "code" / "another.py").write_text(text)
        digests.add(job_digest(job, str(tmp_path / "code")))

    assert len(digests) == 2


def test_the_largest_models_are_begun_first_and_alike_ones_in_their_order(job, tmp_path):
    sizes = {"small": 10, "a": 500, "large": 9999, "b": 500}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    jobs = [replace(job, name=name, input=tmp_path / name) for name in (*sizes, "lost")]

    assert [j.name for j in largest_first(jobs)] == ["large", "a", "b", "small", "lost"]
