"""Candidates are judged by what their ranges were not measured on, where that can be drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core import api
from quant_core.calibrate.gram import bytes_of, gram_matrices
from quant_core.calibrate.matmul_inputs import matmul_inputs
from quant_core.calibrate.observe import Statistics, load_parts, observe, save_parts
from quant_core.config import Contract, QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.random_feeds import RandomSource
from quant_core.data.random_values import Range
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import ModelError
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model.normalize import normalize
from quant_core.plan.types import QuantPlan
from quant_core.search import observing, pipeline
from quant_core.search.bench import Reference
from quant_core.search.calibrated import calibrated_for
from quant_core.search.first_plan import first_plan
from quant_core.search.job import QuantJob
from quant_core.search.judges import (
    choose_judges,
    hold_out_judges,
    needs_hold_out,
)
from quant_core.search.notes import bytes_note
from quant_core.search.observing import observe_shard, observed, with_statistics
from quant_core.search.pipeline import quantize_by_search
from quant_core.search.policy import POLICY
from tests.models import sketch
from tests.oracle.cases import weights

PLAN = QuantPlan(QuantConfig(), "x86", (), {}, {})


class Taking(TimingCache):
    """A timing cache in which every run takes as long."""

    def __init__(self, ms: float) -> None:
        super().__init__()
        self.ms = ms

    def of(self, what, measure):
        return Cost(self.ms, 1.0)


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "m.onnx"
    text = "(float[1,8] x) => (float[1,4] y) { y = MatMul(x, w) }"
    onnx.save(sketch(text, weights(w=(8, 4))), path)
    return path


def drawn(model: Path, count: int) -> Samples:
    return open_samples(SampleSpec(count=count), input_specs(model), model)


def job(model: Path, samples: Samples | None, ms: float = 1e-3, **options) -> QuantJob:
    given = {"samples": samples, "evaluation": samples, "costs": Taking(ms)} | options
    return QuantJob(ir.load(model), model, 1, PLAN, **given)


def test_random_samples_that_ranges_are_measured_on_judge_nothing(model):
    samples = drawn(model, 5)

    judges = choose_judges(job(model, samples)).judges

    assert len(judges) == POLICY.most_drawn_samples
    calibrated = {samples[i]["x"].tobytes() for i in range(5)}
    assert not calibrated & {feed["x"].tobytes() for feed in judges}


def given(model: Path, count: int) -> Samples:
    rows = np.random.default_rng(0).standard_normal((count, 8), dtype=np.float32)
    return open_samples(SampleSpec(rows), input_specs(model))


@pytest.mark.parametrize(("count", "held_out"), [(4, 2), (7, 3), (31, 15), (64, 16)])
def test_some_of_the_given_samples_judge_and_ranges_are_measured_on_the_others(
    model, count, held_out
):
    all_given = job(model, given(model, count), stats=Statistics())

    assert needs_hold_out(all_given, PLAN)
    judging = hold_out_judges(all_given)

    assert len(judging.fitted) == count - held_out
    own = {feed["x"].tobytes() for feed in judging.fitted}
    judges = {judging.judges[i]["x"].tobytes() for i in range(held_out)}
    assert own | judges == {feed["x"].tobytes() for feed in all_given.samples}


def test_samples_that_are_fitted_to_are_measured_apart_from_those_that_judge(model):
    graph, samples = ir.load(model), given(model, 7)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)

    found = observed(replace(job(model, samples), model=graph, plan=plan))

    fitted = hold_out_judges(found).fitted
    for got, seen in ((found.fitted_stats, fitted), (found.stats, samples)):
        wanted = observe(graph, plan, seen)
        assert got.tensors == wanted.tensors
        assert got.means == wanted.means
        assert got.samples == wanted.samples


@pytest.mark.parametrize("shards", [1, 3, 9])
def test_shards_in_files_give_the_same_statistics_as_all_samples_at_once(model, tmp_path, shards):
    graph, samples = ir.load(model), given(model, 7)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)
    whole = replace(job(model, samples), model=graph, plan=plan)
    for k in range(shards):
        parts = observe_shard(graph, plan, samples, (k, shards), NO_DEADLINE)
        save_parts(tmp_path / f"{k}.npz", parts)

    found = with_statistics(whole, [load_parts(tmp_path / f"{k}.npz") for k in range(shards)])

    wanted = observed(whole)
    for got, want in ((found.fitted_stats, wanted.fitted_stats), (found.stats, wanted.stats)):
        assert (got.tensors, got.means, got.samples) == (want.tensors, want.means, want.samples)


@pytest.mark.parametrize("is_stored", [False, True])
def test_gram_matrices_are_summed_up_while_ranges_are_measured(model, tmp_path, is_stored):
    graph, samples = ir.load(model), given(model, 9)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)
    parts = observe_shard(graph, plan, samples, (0, 1), NO_DEADLINE)
    if is_stored:
        save_parts(tmp_path / "stats.npz", parts)
        parts = load_parts(tmp_path / "stats.npz")
    found = with_statistics(replace(job(model, samples), model=graph, plan=plan), [parts])

    fitted = hold_out_judges(found).fitted
    wanted = gram_matrices(graph, matmul_inputs(graph, plan), fitted)
    assert wanted.keys() == found.fitted_stats.gram_matrices.keys()
    for node, matrix in wanted.items():
        np.testing.assert_array_equal(found.fitted_stats.gram_matrices[node], matrix)
    assert not found.stats.gram_matrices  # those that judge have no part in them


@pytest.mark.parametrize("others_judge", [False, True])
def test_gram_matrices_of_three_in_four_samples_stand_for_all(model, others_judge):
    graph, samples = ir.load(model), (given if others_judge else drawn)(model, 32)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)
    whole = replace(job(model, samples), model=graph, plan=plan)
    if others_judge:
        whole = replace(whole, evaluation=given(model, 9))
    parts = observe_shard(graph, plan, samples, (0, 1), NO_DEADLINE)

    calibrated = calibrated_for(with_statistics(whole, [parts]), plan)

    grams = calibrated.stats.gram_matrices
    assert grams
    assert grams is parts[0].gram_matrices  # the samples did not run again


def test_large_gram_matrices_are_not_summed_up_while_ranges_are_measured(model, monkeypatch):
    graph, samples = ir.load(model), given(model, 9)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)
    size_bytes = bytes_of(matmul_inputs(graph, plan))
    monkeypatch.setattr(observing, "POLICY", replace(POLICY, gram_bytes=size_bytes - 1))

    fitted, _ = observe_shard(graph, plan, samples, (0, 1), NO_DEADLINE)

    assert not fitted.gram_matrices


def test_splices_of_given_samples_judge_too_while_the_model_runs_on_them_soon(model):
    samples = given(model, 8)

    many = hold_out_judges(job(model, samples, stats=Statistics())).judges
    few = hold_out_judges(job(model, samples, 1e3, stats=Statistics())).judges

    enough = hold_out_judges(job(model, given(model, 64), stats=Statistics())).judges

    assert (len(many), len(few)) == (POLICY.most_drawn_samples, POLICY.drawn_samples)
    assert len(enough) == 16
    held_out = {samples[i]["x"].tobytes() for i in (1, 3, 5, 7)}
    assert held_out == {few[i]["x"].tobytes() for i in range(4)}
    columns = [set(column) for column in np.concatenate([feed["x"] for feed in samples]).T]
    assert all(value in columns[k] for feed in many for k, value in enumerate(feed["x"][0]))


def test_splices_alone_judge_weights_in_four_bits_that_are_fitted_to_all_samples(tmp_path):
    path = tmp_path / "m.onnx"
    text = "(float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }"
    onnx.save(sketch(text, weights(w=(64, 64))), path)
    rows = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
    samples = open_samples(SampleSpec(rows), input_specs(path))
    graph = ir.load(path)
    normalize(graph)
    plan = first_plan(graph, QuantConfig(bits=4), measured=True)

    judges = choose_judges(replace(job(path, samples), plan=plan)).judges

    assert plan.in_four_bits
    assert len(judges) == POLICY.most_drawn_samples
    fitted = {feed["x"].tobytes() for feed in samples}
    assert not fitted & {feed["x"].tobytes() for feed in judges}


def test_all_given_samples_and_no_splices_judge_a_model_that_gives_classes_alone(tmp_path):
    path = tmp_path / "m.onnx"
    text = "(float[1,8] x) => (int64[1,1] y) { z = MatMul(x, w) y = ArgMax<axis = 1>(z) }"
    onnx.save(sketch(text, weights(w=(8, 4))), path)
    deciding = job(path, given(path, 8), stats=Statistics())

    assert not needs_hold_out(deciding, PLAN)
    assert choose_judges(deciding).judges is deciding.samples


def test_nothing_is_held_out_of_few_samples_or_where_others_judge(model):
    stats, samples = Statistics(), given(model, 8)

    jobs = [
        job(model, given(model, 3), stats=stats),
        job(model, samples, stats=stats, evaluation=given(model, 9)),
        job(model, samples, stats=stats, contract=Contract("cosine", min=0.9)),
        job(model, drawn(model, 8), stats=stats),
    ]

    assert not any(needs_hold_out(each, PLAN) for each in jobs)


@pytest.mark.parametrize("count", [8, 33])
def test_a_plan_says_which_samples_its_weights_were_not_fitted_to(model, tmp_path, count):
    rows = np.random.default_rng(0).standard_normal((count, 8), dtype=np.float32)

    made = api.quantize_model(
        model, tmp_path / "a.onnx", QuantConfig(mode="static"), calibration=rows
    )
    plan = QuantPlan.from_json(made.plan.to_json())
    again = api.quantize_model(model, tmp_path / "b.onnx", plan=plan, calibration=rows)
    of_all = api.quantize_model(
        model, tmp_path / "c.onnx", plan=replace(plan, holdout=0), calibration=rows
    )

    assert plan.holdout == (4 if count >= 32 else 0)
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()
    is_fitted_to_all = Path(made.output).read_bytes() == Path(of_all.output).read_bytes()
    assert is_fitted_to_all == (count < 32)


def test_weights_that_are_worse_when_rounded_for_all_samples_stay_as_they_were(
    model, tmp_path, monkeypatch
):
    rounded_anew = pipeline._rounded_anew

    def worse(found, job, bench):
        made = rounded_anew(found, job, bench)
        [output] = made.best.fidelity.per_output
        low = replace(output, centred_db=13.0, lower_db=13.0)
        fidelity = replace(made.best.fidelity, per_output=(low,))
        return replace(made, best=replace(made.best, fidelity=fidelity))

    monkeypatch.setattr(pipeline, "_rounded_anew", worse)
    rows = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)

    made = api.quantize_model(
        model, tmp_path / "a.onnx", QuantConfig(mode="static"), calibration=rows
    )

    assert made.plan.holdout == 2
    assert made.worst_db > POLICY.noted_db


@pytest.mark.parametrize(("largest", "unsteady"), [(1e-3, set()), (1.0, {"y"})])
def test_float_need_not_repeat_small_probabilities(tmp_path, largest, unsteady):
    path = tmp_path / "m.onnx"
    text = "p = Sigmoid(x) r = Bernoulli(p) y = Mul(r, largest)"
    largest = {"largest": np.array(largest, np.float32)}
    onnx.save(sketch(f"(float[1,8] x) => (float[1,8] y) {{ {text} }}", largest), path)

    assert Reference.run(path, given(path, 4)).unsteady == unsteady


def test_float_need_not_repeat_what_it_draws_from_classes(tmp_path):
    path = tmp_path / "m.onnx"
    text = "y = Multinomial<sample_size = 8>(x) z = ArgMax<axis = 1, keepdims = 0>(x)"
    outputs = "int32[1,8] y, int64[1] z"
    onnx.save(sketch(f"(float[1,8] x) => ({outputs}) {{ {text} }}", {}), path)

    assert Reference.run(path, given(path, 4)).unsteady == {"y"}


def test_float_may_repeat_an_output_on_some_samples_only(tmp_path):
    path = tmp_path / "m.onnx"
    text = "p = Greater(x, zero) s = Sigmoid(x) r = Bernoulli(s) y = Where(p, r, x)"
    zero = {"zero": np.array(0, np.float32)}
    onnx.save(sketch(f"(float[1,8] x) => (float[1,8] y) {{ {text} }}", zero), path)
    rows = np.float32([[-1], [1], [-1], [1]]) * np.ones(8, np.float32)

    reference = Reference.run(path, open_samples(SampleSpec(rows), input_specs(path)))

    assert not reference.unsteady
    assert reference.repeated(4).unsteady == {"y"}


@pytest.mark.parametrize("count", [2, 33])
def test_samples_that_are_all_the_same_are_noted(model, tmp_path, count):
    rows = np.random.default_rng(0).standard_normal((count, 8), dtype=np.float32)
    same = np.repeat(rows[:1], count, axis=0)
    config = QuantConfig(mode="static")

    of_same = api.quantize_model(model, tmp_path / "a.onnx", config, calibration=same)
    of_others = api.quantize_model(model, tmp_path / "b.onnx", config, calibration=rows)

    assert "samples are the same" in of_same.note
    assert "samples are the same" not in of_others.note


def test_bytes_are_noted_where_the_model_takes_floats_that_it_does_not_scale(model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8), dtype=np.uint8)
    samples = open_samples(SampleSpec(pixels), input_specs(model))
    text = "(float[1,8] x) => (float[1,4] y) { s = Identity(x) z = Div(s, w) y = MatMul(z, v) }"
    scaling = tmp_path / "scaling.onnx"
    onnx.save(sketch(text, weights(w=(8,), v=(8, 4))), scaling)

    note = api.quantize_model(model, tmp_path / "a.onnx", calibration=pixels).note

    assert "samples of x are bytes, taken as 0 to 255" in note
    assert bytes_note(samples, scaling) == ""
    assert bytes_note(given(model, 2), model) == ""


def test_the_plan_of_a_repaired_file_makes_the_same_bytes(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "m.onnx"
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    weight[:, 0] *= 1e-4  # is lost by one scale for all
    text = "(float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }"
    onnx.save(sketch(text, {"w": weight}), path)
    rows = rng.standard_normal((33, 64), dtype=np.float32)
    config = QuantConfig(mode="static", per_channel=False)

    made = api.quantize_model(path, tmp_path / "a.onnx", config, calibration=rows)
    again = api.quantize_model(path, tmp_path / "b.onnx", plan=made.plan, calibration=rows)

    assert "rounded otherwise" in made.chosen
    assert made.plan.holdout == 4
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


def test_ranges_that_are_too_narrow_for_other_samples_are_judged_so_and_the_file_knows_all(
    model, tmp_path
):
    rows = np.random.default_rng(0).standard_normal((8, 8), dtype=np.float32)
    rows[3] *= 10  # is held out, as every second is
    config = QuantConfig(mode="static")

    made = api.quantize_model(model, tmp_path / "a.onnx", config, calibration=rows)
    again = api.quantize_model(model, tmp_path / "b.onnx", plan=made.plan, calibration=rows)

    assert made.trace[0]["sqnr_db"] < 10
    assert made.worst_db > 20
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


def test_too_few_given_samples_judge_where_ranges_are_measured_on_them(model):
    samples = given(model, 3)

    judges = choose_judges(job(model, samples)).judges

    assert all((judges[i]["x"] == samples[i]["x"]).all() for i in range(3))
    others = given(model, 9)
    assert choose_judges(job(model, samples, evaluation=others)).judges is others


def test_a_contract_is_judged_by_the_samples_that_it_names(model):
    samples = drawn(model, 5)

    judging = choose_judges(job(model, samples, contract=Contract("cosine", min=0.9)))

    assert judging.judges.same_feeds(samples)


@pytest.mark.parametrize(
    ("ms", "count"), [(1e3, POLICY.drawn_samples), (1e3 * POLICY.drawn_s / 20, 20)]
)
def test_fewer_samples_are_drawn_where_the_model_is_slow(model, ms, count):
    assert len(choose_judges(job(model, drawn(model, 3), ms)).judges) == count
    assert len(choose_judges(job(model, None, ms)).drawn) == count


def test_random_samples_that_the_model_does_not_run_on_are_left_out(tmp_path):
    path = tmp_path / "m.onnx"
    text = "(int64[1] i) => (float[1,4] y) { y = Gather(w, i) }"
    onnx.save(sketch(text, weights(w=(2, 4))), path)
    inputs = input_specs(path)
    source = RandomSource(inputs, {"i": Range((1,), 0, 3, is_whole=True)}, seed=0, length=16)
    samples = Samples(inputs, source, np.arange(16))
    fits = np.array([samples[i]["i"][0] < 2 for i in range(16)])

    reference = Reference.run(path, samples)

    assert 0 < fits.sum() < 16
    assert reference.samples.order.tolist() == np.flatnonzero(fits).tolist()
    assert len(reference.outputs) == fits.sum()
    with pytest.raises(ModelError):
        Reference.run(path, samples.pick(np.flatnonzero(~fits)))


@pytest.mark.parametrize(("mode", "is_judged"), [("weight_only", True), ("static", False)])
def test_a_model_that_more_samples_do_not_change_is_not_judged_again(
    model, tmp_path, monkeypatch, mode, is_judged
):
    fidelities = []
    tune_biases = pipeline.tune_biases

    def noting(found, *arguments):
        fidelities.append(found.best.fidelity)
        return tune_biases(found, *arguments)

    monkeypatch.setattr(pipeline, "tune_biases", noting)
    rows = np.random.default_rng(0).standard_normal((64, 8), dtype=np.float32)

    api.quantize_model(model, tmp_path / "a.onnx", QuantConfig(mode=mode), calibration=rows)

    assert [fidelity is not None for fidelity in fidelities] == [is_judged]


def test_what_was_found_is_not_rounded_again_for_all_samples_where_no_time_is_left(tmp_path):
    path, said = tmp_path / "m.onnx", []
    text = "(float[1,64] x) => (float[1,64] y) { y = MatMul(x, w) }"
    onnx.save(sketch(text, weights(w=(64, 64))), path)
    rows = np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32)
    graph, samples = ir.load(path), open_samples(SampleSpec(rows), input_specs(path))
    normalize(graph)
    plan = first_plan(graph, QuantConfig(), measured=True)
    late = job(path, samples, deadline=Deadline(0.0, 5.0), progress=said.append)
    late = replace(late, model=graph, plan=plan, float_size_bytes=1 << 20)

    made = quantize_by_search(observed(late))

    assert made.best.plan.holdout == 2
    assert said.count("measuring how inputs vary together") == 1
