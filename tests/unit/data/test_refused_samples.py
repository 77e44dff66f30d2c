"""Samples that do not fit their model are refused, with what is wrong and where."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.data.input_spec import InputSpec
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError
from tests.samples import IMAGE, TOKENS, images, opened, saved, spec, zipped


@pytest.mark.parametrize(
    ("array", "wanted", "problem"),
    [
        (np.array([[1.0]]), "int64", "is float64"),
        (np.array([[3_000_000_000]]), "int32", "holds 3000000000, which int32 cannot"),
        (np.array([[-1]]), "uint8", "holds -1, which uint8 cannot"),
        (np.array([[16777217]]), "float32", "holds 16777217, which float32 cannot"),
        (np.array([[2]]), "bool", "holds 2, which bool cannot"),
        (np.array([[1j]]), "float32", "is complex128"),
        (np.array([["a"]]), "float32", "is <U1"),
        (np.array([[1e39]]), "float32", "1 NaN or infinite value as float32"),
    ],
)
def test_values_that_would_change_are_refused(array, wanted, problem):
    with pytest.raises(DataError) as caught:
        opened(array, [spec("x", wanted, "N", 1)])[0]

    assert problem in caught.value.problem
    assert caught.value.where == "array, sample 0, x"


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.zeros(4, int), "4 rows for 5 samples"),
        (np.array(1), "no axis for 5 samples"),
        (np.array(list("abcde")), "labels are <U1"),
        (np.array([0, 1, np.nan, 0, 1]), "NaN"),
    ],
)
def test_labels_that_do_not_fit_the_samples_are_refused(tmp_path, labels, problem):
    for source in (labels, saved(tmp_path / "labels.npy", labels)):
        with pytest.raises(DataError, match=problem):
            opened(images(5), IMAGE, labels=source)


@pytest.mark.parametrize(
    ("arrays", "problem", "hint"),
    [
        (
            {"ids": np.ones((2, 3)), "length": np.ones(2)},
            "'length' is no input",
            "Did you mean lengths?",
        ),
        ({"ids": np.ones((2, 3), int)}, "lacks lengths", "lengths int64[N]"),
        (
            {"ids": np.ones((2, 3), int), "lengths": np.ones(3, int)},
            "different numbers of samples: ids 2, lengths 3",
            "",
        ),
        (
            {"ids": np.ones(2, int), "lengths": np.ones(2, int)},
            "has shape (2,)",
            "Samples of ids int64[N, T]",
        ),
    ],
    ids=["misspelt", "missing", "uneven", "rank"],
)
def test_wrong_names_and_counts_are_errors_before_anything_is_read(tmp_path, arrays, problem, hint):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)

    with pytest.raises(DataError) as caught:
        opened(path, TOKENS)

    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert caught.value.where.startswith(str(path))


def test_one_array_is_not_enough_for_two_inputs(tmp_path):
    with pytest.raises(DataError, match="is one array, but the model has 2 inputs"):
        opened(saved(tmp_path / "x.npy", np.ones((2, 3), int)), TOKENS)


def test_a_sample_of_the_wrong_shape_names_both_shapes(tmp_path):
    np.savez(tmp_path / "7.npz", image=np.zeros((1, 3, 2, 2), np.float32))

    with pytest.raises(DataError, match=r"has shape \(1, 3, 2, 2\)") as caught:
        opened(tmp_path, IMAGE)[0]

    assert caught.value.where == f"{tmp_path / '7.npz'}, image"
    assert caught.value.hint == "The model takes image float32[N, 1, 2, 2]"


def test_a_feed_without_the_axis_of_samples_is_told_so():
    with pytest.raises(DataError, match="with its first axis"):
        opened([np.zeros((1, 2, 2), np.float32)], IMAGE)[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named_with_its_place(bad):
    data = images(4)
    data[2, 0, 1, 0] = bad
    samples = opened(data, IMAGE)

    assert samples[1] is not None
    with pytest.raises(DataError, match=r"the first \(-?(nan|inf)\) at \(0, 0, 1, 0\)") as caught:
        samples[2]
    assert caught.value.where == "array, sample 2, image"


def test_an_empty_source_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    sources = [
        saved(tmp_path / "x.npy", images(0)),
        zipped(tmp_path / "x.npz", 0),
        empty,
        images(0),
        [],
        {"image": images(0)},
    ]

    for source in sources:
        with pytest.raises(DataError):
            opened(source, IMAGE)


def test_too_few_samples_for_a_fixed_batch_are_refused():
    with pytest.raises(DataError, match="too few samples"):
        opened(images(3), [spec("image", "float32", 4, 1, 2, 2)])


def test_feeds_that_are_no_mappings_are_refused():
    with pytest.raises(DataError, match="is tuple") as caught:
        opened([(images(1), 0)], IMAGE)

    assert "input names" in caught.value.hint


def test_an_array_is_no_feed_of_two_inputs():
    two = [spec("a", "float32", "N", 2), spec("b", "float32", "N", 2)]

    with pytest.raises(DataError, match="feed 0: is one array, but the model has 2 inputs"):
        opened([np.zeros((1, 2), np.float32)], two)


def test_a_fixed_batch_cannot_be_another():
    inputs = [InputSpec("x", np.dtype("float32"), (1, 2))]
    samples = open_samples(SampleSpec(np.zeros((3, 2), np.float32)), inputs)

    with pytest.raises(DataError, match="fixes it"):
        samples.batch(2)
