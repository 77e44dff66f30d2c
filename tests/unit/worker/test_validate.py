"""How many samples the stage `validate` compares the two models on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.search import judges
from quant_core.worker import stages
from tests.models import sketch
from tests.samples import spec

CONTRACT = {"metric": "sqnr", "min": 20.0}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(sketch("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }"), path)
    return str(path)


def samples_of(folder, count, labels=None):
    path = folder / "x.npy"
    np.save(path, np.arange(4 * count, dtype=np.float32).reshape(count, 4))
    return SampleSpec(str(path), labels=labels).to_dict()


@pytest.mark.parametrize(
    ("contract", "are_stand_ins", "count"),
    [(None, True, 32), (None, False, 100), (CONTRACT, True, 100)],
)
def test_a_few_samples_are_compared_where_none_were_given_to_judge_by_and_nothing_is_promised(
    model, tmp_path, contract, are_stand_ins, count
):
    samples = samples_of(tmp_path, 100)

    found = stages.validate(model, model, samples, contract, are_stand_ins=are_stand_ins)

    assert found["fidelity"]["samples"] == count


def test_all_samples_with_labels_are_compared(model, tmp_path):
    np.save(tmp_path / "labels.npy", np.zeros(100, np.int64))
    samples = samples_of(tmp_path, 100, str(tmp_path / "labels.npy"))

    found = stages.validate(model, model, samples, None, are_stand_ins=True)

    assert found["fidelity"]["samples"] == 100


@pytest.mark.parametrize(("count", "held_out"), [(20, 10), (64, 16), (128, 32), (1000, 32)])
def test_the_few_are_first_of_all_those_that_may_have_been_held_out(
    model, monkeypatch, count, held_out
):
    few = stand_ins_of(model, monkeypatch, count, takes_ms=0.1)

    step = 2 if count < 32 else 4
    assert len(few) == min(count, 32)
    assert sum(position % step == step - 1 for position in few) == held_out
    assert few == sorted(few)


@pytest.mark.parametrize(("takes_ms", "compared"), [(10.0, 32), (20.0, 25), (1000.0, 16)])
def test_fewer_are_compared_of_a_slow_original_though_not_the_fewest(
    model, monkeypatch, takes_ms, compared
):
    few = stand_ins_of(model, monkeypatch, 128, takes_ms)

    assert len(few) == compared
    assert all(position % 4 == 3 for position in few)


def stand_ins_of(model, monkeypatch, count, takes_ms):
    """Positions of those of `count` samples that stand in; one run of the model takes so long."""
    monkeypatch.setattr(judges, "one_run", lambda *_: Cost(takes_ms, 1.0))
    x = np.zeros((count, 4), np.float32)
    samples = open_samples(SampleSpec({"x": x}), [spec("x", "float32", "n", 4)])
    return [*judges.stand_ins(Path(model), samples, TimingCache()).order]
