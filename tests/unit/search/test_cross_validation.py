"""What is said of weights in 4 bits holds for samples that they were not fitted to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core import api, validate_model
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.plan.types import Storage
from quant_core.search.cross_validation import _parts
from tests.models import sketch
from tests.oracle.cases import weights

WORDS = 512


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "m.onnx"
    text = f"""(float[1,{WORDS}] x) => (float[1,8] y) {{
        h = MatMul(x, u) r = Relu(h) y = MatMul(r, w)
    }}"""
    onnx.save(sketch(text, weights(u=(WORDS, 32), w=(32, 8))), path)
    return path


def texts(count: int, seed: int) -> np.ndarray:
    """Which words are in each of some texts: most words are in none of a few."""
    return (np.random.default_rng(seed).random((count, WORDS)) < 0.05).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_weights_that_are_fitted_to_few_samples_are_said_to_be_as_others_find_them(
    model, tmp_path, seed
):
    config = QuantConfig(bits=4, mode="weight_only")

    made = api.quantize_model(model, tmp_path / "a.onnx", config, calibration=texts(8, seed))

    others = validate_model(model, made.output, texts(64, 99)).fidelity
    # two standard deviations of the mean square of 8 outputs for 8 samples
    assert made.worst_db <= others.sound_db + 10 * np.log10(1 + 2 * np.sqrt(2 / 64))


def test_samples_that_follow_one_another_in_a_stream_are_held_out_together(model, tmp_path):
    stream = np.repeat(texts(4, 0), 4, axis=0)
    config = QuantConfig(bits=4, mode="weight_only")

    made = api.quantize_model(model, tmp_path / "a.onnx", config, calibration=stream)

    others = validate_model(model, made.output, texts(64, 99)).fidelity
    # as above, of two texts that differ
    assert made.worst_db <= others.sound_db + 10 * np.log10(1 + 2 * np.sqrt(2 / 16))


def test_nodes_get_more_bits_where_only_other_samples_are_below_the_floor(model, tmp_path):
    rows, config = texts(8, 0), QuantConfig(bits=4, mode="weight_only")
    said = api.quantize_model(model, tmp_path / "a.onnx", config, calibration=rows)
    floor_db = said.worst_db + 2  # those that weights are fitted to are 5 dB better
    config = replace(config, floor_db=floor_db)

    made = api.quantize_model(model, tmp_path / "b.onnx", config, calibration=rows)
    again = api.quantize_model(model, tmp_path / "c.onnx", plan=made.plan, calibration=rows)

    assert made.verdict == "none"
    assert made.worst_db >= floor_db
    assert Storage.INT8 in {node.storage for node in made.plan.nodes}
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


@pytest.mark.parametrize(("count", "judging"), [(4, 4), (8, 8), (15, 11), (31, 15)])
def test_samples_that_judge_are_fitted_to_in_none_of_the_parts_that_hold_them_out(
    model, count, judging
):
    samples = open_samples(SampleSpec(texts(count, 0)), input_specs(model))

    parts = _parts(samples)

    held_out = np.concatenate([own for _, own in parts])
    assert len(held_out) == len(set(held_out)) == judging
    for fitted, own in parts:
        assert not set(fitted) & set(own)
        assert len(fitted) + len(own) == count
