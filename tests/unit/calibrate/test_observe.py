"""What calibration sees of many samples is what it sees of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quant_core.calibrate import observe as observing
from quant_core.calibrate.observe import Statistics, observe, observe_each
from quant_core.config import QuantConfig
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.models import normalized, sketch
from tests.oracle.cases import weights


@pytest.mark.parametrize("waiting_bytes", [0, 4096, 1 << 30])
def test_samples_that_are_counted_together_give_what_each_gives(
    waiting_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several sizes, and with rows that are not finite."""
    text = "(float[n,5,k] x) => (float[n,5,4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, w) }"
    proto = sketch(text, weights(u=(6, 8), w=(8, 4)))
    plan = make_plan(normalized(proto), QuantConfig(min_elements=0), TARGETS["x86"])
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((n, 5, 6), dtype=np.float32)} for n in (1, 1, 2, 1, 1)]
    feeds[1]["x"][0, 2] = np.nan
    source = proto.SerializeToString()
    each = Statistics.merged(observe(source, plan, [feed]) for feed in feeds)

    monkeypatch.setattr(observing, "WAITING_BYTES", waiting_bytes)
    together = observe(source, plan, feeds)

    assert together.tensors == each.tensors
    assert together.means == each.means
    assert together.means


def test_large_samples_that_are_counted_together_give_what_each_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where some of the values are counted, and one sample has some that are not finite."""
    monkeypatch.setattr(observing, "MIN_SPREAD", 16)
    text = "(float[n,100] x, float[n,100] z) => (float[n,4] y) { a = Add(x, z) y = MatMul(a, w) }"
    proto = sketch(text, weights(w=(100, 4)))
    plan = make_plan(normalized(proto), QuantConfig(min_elements=0), TARGETS["x86"])
    plan = replace(plan, activations=dict.fromkeys(("x", "z", "a"), ""), means={})
    rng = np.random.default_rng(0)
    feeds = [{name: rng.standard_normal((1, 100), np.float32) for name in "xz"} for _ in range(4)]
    feeds[1]["x"][0, 20:60] = np.inf
    source = proto.SerializeToString()
    each = Statistics.merged(observe(source, plan, [feed]) for feed in feeds)

    together = observe(source, plan, feeds)

    assert together.tensors == each.tensors
    assert together.tensors["z"].count == 4 * 34  # every third of 100 values
    assert together.tensors["z"].hi == max(feed["z"].max() for feed in feeds)


@pytest.mark.parametrize("shape", [(64, 160, 160), (160, 160, 64), (3, 640, 640), (1 << 20,)])
def test_spread_values_are_of_each_channel_row_and_column(shape: tuple[int, ...]) -> None:
    x = np.arange(2 * np.prod(shape)).reshape(2, *shape)

    first, second = observing._spread(x)

    size = x[0].size
    assert size > len(first) >= observing.MIN_SPREAD
    assert np.array_equal(first + size, second)
    for positions, length in zip(np.unravel_index(first, shape), shape, strict=True):
        counts = np.bincount(positions, minlength=length)
        assert counts.max() <= 1.1 * counts.min() + 1


def test_shards_that_are_observed_at_once_give_what_each_gives() -> None:
    proto = sketch("(float[n,6] x) => (float[n,8] y) { y = MatMul(x, u) }", weights(u=(6, 8)))
    plan = make_plan(normalized(proto), QuantConfig(min_elements=0), TARGETS["x86"])
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((n, 6), dtype=np.float32)} for n in (3, 1, 2, 4, 1)]
    shards, source = [feeds[:2], feeds[2:]], proto.SerializeToString()

    for found, shard in zip(observe_each(source, plan, shards), shards, strict=True):
        alone = observe(source, plan, shard)
        assert found.tensors == alone.tensors
        assert found.means == alone.means
        assert found.samples == len(shard)


@pytest.mark.parametrize("part_bytes", [1, 1 << 30])
def test_samples_are_counted_whether_their_values_come_in_one_part_or_in_several(
    part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_core.model.values.MAX_PART_BYTES", part_bytes)
    text = "(float[n,6] x) => (float[n,4] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, w) }"
    proto = sketch(text, weights(u=(6, 8), w=(8, 4)))
    plan = make_plan(normalized(proto), QuantConfig(min_elements=0), TARGETS["x86"])
    feeds = [{"x": np.full((1, 6), i, np.float32)} for i in range(3)]

    assert observe(proto.SerializeToString(), plan, feeds).samples == 3
