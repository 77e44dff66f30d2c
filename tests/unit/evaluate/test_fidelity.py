"""Fidelity: sums, decisions and labels, on numbers small enough to check by eye."""

import json
import math

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_core.config import Contract
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.contract import Verdict, judge
from quant_core.evaluate.decisions import Decisions
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.outputs import run_all, run_each
from quant_core.model.session import open_session
from tests.unit.evaluate.outputs import feeds, rows


def linear(weight):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def test_a_rounded_weight_is_compared_through_onnxruntime():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 3)).astype(np.float32)
    exact, coarse = open_session(linear(weight)), open_session(linear(np.round(weight * 8) / 8))
    samples = open_samples(
        SampleSpec(rng.standard_normal((50, 4)).astype(np.float32)), input_specs(exact)
    )
    reference = run_all(exact, samples)

    fidelity = compare(reference, run_each(coarse, samples), ["y"])

    wanted, got = (
        np.concatenate([o[0] for o in outputs], dtype=np.float64)
        for outputs in (reference, run_all(coarse, samples))
    )
    sqnr_db = 10 * np.log10((wanted**2).sum() / ((got - wanted) ** 2).sum())
    cosine = (wanted * got).sum() / np.sqrt((wanted**2).sum() * (got**2).sum())
    assert fidelity.samples == 50
    assert fidelity.sqnr_db == pytest.approx(sqnr_db)
    assert fidelity.cosine == pytest.approx(cosine)
    assert fidelity.max_abs_error == pytest.approx(np.abs(got - wanted).max())
    assert fidelity.agreement == (wanted.argmax(1) == got.argmax(1)).mean()


@pytest.mark.parametrize(
    ("noises", "lower"),
    [
        ([1, 1, 1, 1], 1 / 100),  # all alike: nothing else is to be expected of others
        # residuals -1, -1, 1, 1: a variance of 4 / 3
        ([0, 0, 2, 2], (1 + 1.645 * (4 / 3 * (1 / 4 + 1 / 8)) ** 0.5) / 100),
        ([1], 1 / 100),  # of one feed no spread is known
    ],
)
def test_the_lower_bound_of_sqnr_holds_for_a_few_other_samples(noises, lower):
    want = feeds(*(np.full((1, 1), 10.0) for _ in noises))
    got = feeds(*(np.full((1, 1), 10.0 + noise**0.5) for noise in noises))

    output = compare(want, got, ["y"]).per_output[0]

    assert output.sqnr_db == pytest.approx(20 if sum(noises) else 200)
    assert output.lower_db == pytest.approx(-10 * np.log10(lower))


@pytest.mark.parametrize(
    ("spread", "db"),
    [(1, 20), (0.01, -20), (0.001, 60)],  # below a ten-thousandth of 100 all counts
)
def test_an_output_is_judged_around_its_mean_where_it_varies(spread, db):
    want = [np.array([[100.0 + spread], [100.0 - spread]])] * 4

    output = compare(feeds(*want), feeds(*(x + 0.1 for x in want)), ["age"]).per_output[0]

    assert output.sqnr_db == pytest.approx(60, abs=0.1)
    assert output.sound_db == output.sound_lower_db == pytest.approx(db, abs=0.1)
    assert ("around its mean" in output.nearness) == (db < 60)


@pytest.mark.parametrize(
    ("want", "got", "db"),
    [
        ([3, 1, 2, 5], [3, 1, 2, 5], 200),
        ([3, 1, 2, 5], [3, 1, 2, 9], 200),  # one decision that differs is luck
        ([1] * 100, [1] * 89 + [9] * 11, 20),  # 11 in 100 classes differ, 10 but for luck
        ([0, 50, 100, 150], [1, 51, 101, 151], 35),  # numbers are close though all differ
        ([7, 8] * 50, [7, 7, 8, 8] * 25, 6.2),  # a coin flips, though 7 is not far from 8
        ([True] * 4, [False] * 4, 2.5),
    ],
)
def test_integers_are_judged_as_numbers_and_as_decisions(want, got, db):
    output = compare(feeds(want), feeds(got), ["y"]).per_output[0]

    assert output.sqnr_db is None
    assert output.sound_db == output.sound_lower_db == pytest.approx(db, abs=0.1)


def test_a_mask_that_loses_a_rare_class_is_broken():
    mask = np.zeros((4, 100, 100), np.int64)
    mask[:, 20:30, 40:45] = 1  # 0.5 %
    moved = np.roll(mask, 1, axis=2)  # four fifths are where they were

    lost = compare(feeds(*mask), feeds(*0 * mask), ["mask"]).per_output[0]
    kept = compare(feeds(*mask), feeds(*moved), ["mask"]).per_output[0]

    assert lost.agreement == 0.995
    assert lost.sound_db == lost.sound_lower_db < 12
    assert kept.sound_db > 20


def test_a_class_of_a_few_decisions_proves_nothing():
    mask = np.zeros((4, 100, 100), np.int64)
    mask[0, 0, :2] = 1

    lost = compare(feeds(*mask), feeds(*0 * mask), ["mask"]).per_output[0]

    assert lost.sound_db > 40


@pytest.mark.parametrize("classes", [2, 5, 50])
def test_classes_in_balance_are_judged_by_the_share_of_all(classes):
    want = np.arange(1000) * 17 % classes
    got = np.where(np.arange(1000) // classes % 10 == 3, (want + classes // 2) % classes, want)

    output = compare(feeds(want), feeds(got), ["y"]).per_output[0]

    assert output.class_agreement == pytest.approx(output.agreement, abs=1e-3)
    assert output.sound_db == pytest.approx(20, abs=0.5)


def test_decisions_of_few_samples_do_not_show_that_an_output_misses_the_aim():
    """Those of one sample that differ do so together, so that samples are what is counted."""
    is_wrong = np.arange(32) % 8 == 0  # one sample of eight, and all of its twenty decisions
    want = [np.zeros((1, 20), np.int64) for _ in is_wrong]
    got = [x + 9 * wrong for x, wrong in zip(want, is_wrong, strict=True)]

    few = compare(feeds(*want), feeds(*got), ["y"]).per_output[0]
    many = compare(feeds(*want * 100), feeds(*got * 100), ["y"]).per_output[0]

    assert few.sound_db == pytest.approx(many.sound_db, abs=0.2) == pytest.approx(18, abs=0.3)
    assert few.sound_lower_db > 22
    assert many.sound_lower_db < 20


@pytest.mark.parametrize(("noise", "db"), [(0.3, 10.5), (0.1, 20), (0.03, 30.5)])
def test_decisions_count_as_about_as_many_decibels_as_the_scores_that_they_were_made_of(noise, db):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20_000, 10))
    noisy = scores + noise * rng.standard_normal(scores.shape)

    classes = compare(feeds(scores.argmax(1)), feeds(noisy.argmax(1)), ["y"]).per_output[0]

    assert classes.sound_db == pytest.approx(db, abs=3)


def test_nine_of_ten_small_sets_of_other_samples_are_above_the_lower_bound():
    """By a noise that is rare and large, as of pitches that flip; 95 % holds for a normal one."""
    rng = np.random.default_rng(0)

    def noisy(count: int):
        flips = 10 * (rng.random((count, 1)) < 0.1)
        want = np.full((count, 1, 1), 20.0)
        return compare(feeds(*want), feeds(*(want + 1 + flips[..., None])), ["y"]).per_output[0]

    above = [noisy(8).sqnr_db > noisy(64).lower_db for _ in range(200)]

    assert np.mean(above) > 0.9


def test_identical_outputs_are_perfect():
    outputs = rows(np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32))

    fidelity = compare(outputs, outputs, ["y"])

    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_abs_error, fidelity.agreement) == (
        200,
        pytest.approx(1),
        0,
        1,
    )


def test_all_zeros_compare_without_a_division_by_zero():
    zeros, ones = rows(np.zeros((2, 3), np.float32)), rows(np.ones((2, 3), np.float32))

    assert compare(zeros, zeros, ["y"]).cosine == 1
    assert compare(zeros, ones, ["y"]).cosine == 0
    assert compare(zeros, ones, ["y"]).sqnr_db == -200


@pytest.mark.parametrize("batches", [[6], [1] * 6, [4, 2], [1, 3, 2]])
def test_the_split_into_feeds_does_not_matter(batches):
    rng = np.random.default_rng(2)
    wanted, got = rng.standard_normal((2, 6, 3))
    labels, cuts = np.array([0, 1, 2, 0, 1, -1]), np.cumsum(batches)[:-1]

    whole = compare(feeds(wanted), feeds(got), ["y"], labels)
    split = compare(feeds(*np.split(wanted, cuts)), feeds(*np.split(got, cuts)), ["y"], labels)

    assert split.sqnr_db == pytest.approx(whole.sqnr_db)
    assert (split.samples, split.agreement, split.top1, split.flips_bad) == (
        6,
        whole.agreement,
        whole.top1,
        whole.flips_bad,
    )


# Decisions


def test_labels_give_top1_and_paired_flips():
    wanted = np.eye(3)[[0, 1, 2, 0, 1]]
    got = np.eye(3)[[0, 2, 2, 1, 0]]
    labels = np.array([0, 1, 1, 1, -1])

    fidelity = compare(rows(wanted), rows(got), ["y"], labels)

    assert (fidelity.top1_float, fidelity.top1) == (2 / 4, 2 / 4)
    assert (fidelity.flips_bad, fidelity.flips_good) == (1, 1)
    assert fidelity.agreement == 2 / 5


def test_positions_of_sequences_are_judged_one_by_one_and_padding_may_be_longer():
    wanted = feeds(np.eye(2)[[[0, 1, 1]]], np.eye(2)[[[1, 0]]])
    got = feeds(np.eye(2)[[[0, 1, 0]]], np.eye(2)[[[1, 1]]])
    labels = np.array([[0, 1, 1], [1, 0, -100]])

    fidelity = compare(wanted, got, ["y"], labels)

    assert (fidelity.top1_float, fidelity.top1, fidelity.flips_bad) == (1.0, 3 / 5, 2)


def test_labels_beyond_the_sequence_that_are_not_ignored_do_not_fit():
    with pytest.raises(DataError, match="fit no output"):
        compare(
            feeds(np.eye(2)[[[0, 1]]]), feeds(np.eye(2)[[[0, 1]]]), ["y"], np.array([[0, 1, 1]])
        )


@pytest.mark.parametrize(
    ("wanted", "got", "agreement"),
    [
        ([[0.4], [0.6], [0.9]], [[0.6], [0.6], [0.9]], 2 / 3),
        ([[-0.4], [0.3], [9.0]], [[-0.1], [0.6], [-1]], 2 / 3),
        ([0.1, 0.2, 0.9], [0.4, 0.6, 1.7], 2 / 3),
    ],
    ids=["probabilities at a half", "scores at zero", "without a class axis"],
)
def test_a_single_score_decides_by_threshold(wanted, got, agreement):
    assert compare(rows(wanted), rows(got), ["y"]).agreement == pytest.approx(agreement)


def test_an_image_of_classes_decides_over_axis_1():
    wanted = np.zeros((1, 3, 2, 2))
    wanted[0, 2] = 1
    labels = np.full((1, 2, 2), 2)

    assert compare(feeds(wanted), feeds(wanted), ["y"], labels).top1 == 1


def test_decisions_of_two_blocks_add_up():
    first, second = Decisions(4, 3, 2, 1, 2, 1), Decisions(6, 6, 5, 4, 3, 2)

    assert first + second == Decisions(10, 9, 7, 5, 5, 3)
    assert (first + second).agreement == 0.9
    assert Decisions().agreement is None


@pytest.mark.parametrize(
    "of",
    [
        lambda x: np.array([x, x[:1]], object),  # items of two shapes
        lambda x: np.array([x, x], object),
        lambda x: np.array([{"a": x[0, 0], "b": x[0, 1]}], object),  # a map, as of ZipMap
    ],
)
def test_sequences_and_maps_are_judged_by_their_numbers(of):
    x = np.array([[1.0, 10.0], [3.0, 4.0]])

    near, far = (compare([[of(x)]], [[of(x + e)]], ["y"]) for e in (0.01, 9.0))

    assert near.sound_db > 40
    assert far.sound_db < 5


def test_integer_outputs_are_their_own_decisions():
    fidelity = compare(rows([3, 1, 2, 2]), rows([3, 1, 2, 0]), ["class"], np.array([3, 0, 2, 2]))

    assert (fidelity.agreement, fidelity.top1_float, fidelity.top1) == (3 / 4, 3 / 4, 2 / 4)
    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_abs_error) == (None, None, None)


def test_labels_choose_the_output_they_fit_and_agreement_follows():
    scores, boxes = np.eye(3)[[0, 1, 2]], np.random.default_rng(3).standard_normal((3, 7, 4))
    wanted = [[boxes[i : i + 1], scores[i : i + 1]] for i in range(3)]
    got = [[-boxes[i : i + 1], scores[i : i + 1]] for i in range(3)]

    fidelity = compare(wanted, got, ["boxes", "scores"], np.array([0, 1, 0]))

    assert (fidelity.top1, fidelity.agreement) == (2 / 3, 1)
    assert [o.name for o in fidelity.per_output] == ["boxes", "scores"]
    assert fidelity.per_output[0].agreement < 1


def test_a_state_whose_first_axis_is_no_batch_has_no_say_in_agreement():
    scores, state = np.array([[0.9]]), np.random.default_rng(4).standard_normal((2, 1, 8))

    assert compare([[scores, state]], [[scores, -state]], ["y", "state"]).agreement == 1


def test_labels_that_fit_no_output_are_refused_with_what_would_fit():
    with pytest.raises(DataError, match="fit no output") as caught:
        compare(rows(np.eye(3)), rows(np.eye(3)), ["y"], np.zeros((3, 4, 5), int))

    assert "output y has 3 rows" in caught.value.hint


def test_labels_that_are_no_classes_are_not_passed_over_in_silence():
    fidelity = compare(rows(np.eye(3)), rows(np.eye(3)), ["y"], np.array([0.0, 1.0, 2.0]))

    assert (fidelity.top1, fidelity.note[:18]) == (None, "labels are float64")


def test_labels_that_are_all_ignored_are_refused():
    with pytest.raises(DataError, match="below zero"):
        compare(rows(np.eye(3)), rows(np.eye(3)), ["y"], np.full(3, -1))


def test_a_float_model_that_only_guesses_is_noted():
    rng = np.random.default_rng(5)
    guesses, labels = rng.standard_normal((300, 10)), rng.integers(0, 10, 300)

    assert (
        "guessing among 10 classes" in compare(feeds(guesses), feeds(guesses), ["y"], labels).note
    )
    assert compare(feeds(guesses), feeds(guesses), ["y"], guesses.argmax(1)).note == ""


# What is broken


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_is_the_worst_and_says_so(bad):
    wanted, got = np.eye(3), np.eye(3)
    got[1, 1] = bad

    fidelity = compare(rows(wanted), rows(got), ["y"], np.arange(3))

    assert (fidelity.sqnr_db, fidelity.cosine, fidelity.max_abs_error) == (-200, -1, math.inf)
    assert fidelity.flaws == ("output y holds 1 NaN or infinite value",)
    assert judge(fidelity, Contract(min=0.0)).verdict == Verdict.NOT_MET


def test_nan_is_no_decision():
    got = np.eye(3)
    got[0] = np.nan

    fidelity = compare(rows(np.eye(3)), rows(got), ["y"], np.array([0, 1, 2]))

    assert (fidelity.agreement, fidelity.top1) == (2 / 3, 2 / 3)


def test_an_output_of_another_shape_is_broken_not_a_crash():
    fidelity = compare(feeds(np.eye(3)), feeds(np.eye(4)), ["y"], np.arange(3))

    assert fidelity.flaws == ("output y has shape (4, 4) where float has (3, 3)",)
    assert (fidelity.top1, fidelity.agreement, fidelity.sqnr_db) == (0, 0, -200)


def test_masked_logits_of_the_float_model_are_no_error():
    wanted = np.array([[1.0, -np.inf, 2.0], [1.0, np.finfo(np.float32).min, 2.0]])
    got = wanted.copy()
    got[:, 0] = 1.5

    fidelity = compare(rows(wanted), rows(got), ["y"])

    assert fidelity.flaws == ()
    assert fidelity.sqnr_db == pytest.approx(10 * np.log10((2 * 1 + 2 * 4) / (2 * 0.25)))


def test_models_of_different_outputs_are_refused():
    with pytest.raises(ModelError, match="gives 1 output, float gives 2"):
        compare([[np.eye(2), np.eye(2)]], [[np.eye(2)]], ["a", "b"])


def test_nothing_to_compare_is_an_error():
    with pytest.raises(DataError, match="nothing to compare"):
        compare([], [], ["y"])


def test_outputs_without_a_row_compare_as_equal():
    nothing = np.zeros((0, 4), np.float32)

    fidelity = compare([[nothing]], [[nothing]], ["boxes"])

    assert fidelity.per_output[0].flaw == ""
    assert fidelity.samples == 0


def test_fidelity_is_plain_json_even_when_infinite():
    fidelity = compare(feeds(np.eye(2)), feeds(np.full((2, 2), np.nan)), ["y"])

    values = json.loads(json.dumps(fidelity.to_dict(), allow_nan=False))

    assert values["max_abs_error"] is None
    assert values["per_output"][0]["name"] == "y"
