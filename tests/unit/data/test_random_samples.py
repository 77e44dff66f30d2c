"""Random samples: the same for a seed, of shapes that the model or the user gives."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.errors import DataError
from tests.samples import IMAGE, TOKENS, opened, spec, values


def test_random_feeds_are_the_same_for_a_seed_and_however_they_are_split():
    specs = [
        *IMAGE,
        spec("ids", "int64", "N", "T"),
        spec("attention_mask", "int64", "N", "T"),
        spec("on", "bool"),
    ]

    whole = values(opened("random", specs, count=6, seed=3))
    parts = [values(opened("random", specs, count=6, seed=3).shard(k, 2)) for k in (0, 1)]

    assert whole[::2] == parts[0]
    assert whole[1::2] == parts[1]
    assert whole != values(opened("random", specs, count=6, seed=4))
    assert {v for feed in whole for v in feed["ids"][0]} == {0, 1}
    assert {v for feed in whole for v in feed["attention_mask"][0]} == {1}


def test_random_shapes_come_from_the_model_then_from_shape_then_from_defaults():
    image, tokens = [spec("x", "float32", None, 3, "H", "W")], spec("ids", "int64", "N", "T")
    state = spec("state", "float32", 2, "N", 8)

    assert opened("random", image)[0]["x"].shape == (1, 3, 224, 224)
    assert opened("random", image, shape=[3, 32, 64])[0]["x"].shape == (1, 3, 32, 64)
    assert opened("random", image, shape={"x": [4, 3, 32, 64]})[0]["x"].shape == (
        4,
        3,
        32,
        64,
    )
    assert opened("random", [tokens, state], shape={"ids": [1, 9]})[0]["ids"].shape == (1, 9)
    assert opened("random", [tokens, state])[0]["state"].shape == (2, 1, 8)


@pytest.mark.parametrize(
    ("name", "shape", "drawn"),
    [
        ("x", ("?", 3, "?", "?"), (1, 3, 224, 224)),
        ("x", ("None", "None", "None", 3), (1, 224, 224, 3)),
        ("waveform", ("?", "?"), (1, 16000)),
        ("x", ("?", 80, "?"), (1, 80, 32)),
        ("x", ("N", 3, "N", "N"), (1, 3, 224, 224)),
        ("x", ("N", 80, "N"), (32, 80, 32)),
        ("adjacency", ("nodes", "nodes"), (32, 32)),  # one size, in which it is square
    ],
)
def test_open_axes_that_an_exporter_called_alike_are_told_apart(name, shape, drawn):
    assert opened("random", [spec(name, "float32", *shape)])[0][name].shape == drawn


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"imag": [1, 1, 2, 2]}, "no input"),
        ([1, 3, 2, 2], r"\[1, 3, 2, 2\]"),
        ([2], r"\[2\]"),
        ([1, 1, 0, 2], r"\[1, 1, 0, 2\]"),
    ],
)
def test_a_shape_that_does_not_fit_the_model_is_refused(shape, problem):
    with pytest.raises(DataError, match=problem):
        opened("random", IMAGE, shape=shape)


def test_one_shape_for_several_inputs_is_refused():
    with pytest.raises(DataError, match="2 inputs"):
        opened("random", TOKENS, shape=[1, 5])


def test_text_cannot_be_random():
    with pytest.raises(DataError, match="text"):
        opened("random", [spec("words", "str", "N")])


def test_random_samples_have_no_labels():
    with pytest.raises(DataError, match="no right answers"):
        opened("random", IMAGE, labels=np.zeros(16, int))
