"""Candidates are judged by what their ranges were not measured on, where that can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.config import Contract, QuantConfig
from quant_core.data.random_feeds import RandomSource
from quant_core.data.random_values import Range
from quant_core.data.samples import Samples, input_specs, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import ModelError
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import Reference
from quant_core.search.job import QuantJob
from quant_core.search.judges import choose_judges
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
    return QuantJob(None, model, 1, PLAN, **given)


def test_random_samples_that_ranges_are_measured_on_judge_nothing(model):
    samples = drawn(model, 5)

    judges = choose_judges(job(model, samples)).judges

    assert len(judges) == POLICY.most_drawn_samples
    calibrated = {samples[i]["x"].tobytes() for i in range(5)}
    assert not calibrated & {feed["x"].tobytes() for feed in judges}


def test_given_samples_judge_also_where_ranges_are_measured_on_them(model):
    given = open_samples(SampleSpec(np.ones((5, 8), np.float32)), input_specs(model))

    assert choose_judges(job(model, given)).judges is given


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
