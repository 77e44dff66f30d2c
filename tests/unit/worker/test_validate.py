"""How many samples the stage `validate` compares the two models on."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.search.judges import stand_ins
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
def test_the_few_are_first_of_all_those_that_may_have_been_held_out(count, held_out):
    x = np.arange(count, dtype=np.float32)[:, None]
    samples = open_samples(SampleSpec({"x": x}), [spec("x", "float32", "n", 1)])

    few = stand_ins(samples)

    step = 2 if count < 32 else 4
    assert len(few) == min(count, 32)
    assert sum(position % step == step - 1 for position in few.order) == held_out
    assert [*few.order] == sorted(few.order)
