"""Layers that are rounded one after the other make up for the errors of the layers before them."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from quant_core.calibrate.gram import gram_matrices
from quant_core.calibrate.matmul_inputs import matmul_inputs
from quant_core.calibrate.observe import Statistics, observe
from quant_core.config import QuantConfig
from quant_core.deadline import Deadline
from quant_core.model.session import open_session
from quant_core.model.values import values_of
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from quant_core.rewrite.sequential import round_sequentially, shrinkage
from tests.models import normalized, random_feed, sketch
from tests.oracle.cases import weights

NETWORKS = {
    "a chain": "a = Conv<pads = [1, 1, 1, 1]>(x, w, b)  r = Relu(a)  c = Conv(r, v)"
    "  y = GlobalAveragePool(c)",
    "a shortcut": "a = Conv<pads = [1, 1, 1, 1]>(x, w)  r = Relu(a) "
    " c = Conv<pads = [1, 1, 1, 1]>(r, w)"
    "  s = Add(c, x)  d = Conv(s, v)  y = GlobalAveragePool(d)",
    "a branch": "a = Conv<pads = [1, 1, 1, 1]>(x, w)  m = ReduceMean<keepdims = 0>(a) "
    " z = Greater(m, zero)"
    "  c = If(z) <then_branch = t () => (float[n,8,h,k] p) { p = Relu(a) },"
    " else_branch = e () => (float[n,8,h,k] o) { o = Neg(a) }>  d = Conv(c, v) "
    " y = GlobalAveragePool(d)",
}


def network(name: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((8, 8, 3, 3), np.float32) / 8,
        "v": rng.standard_normal((12, 8, 3, 3), np.float32) / 8,
        "b": rng.standard_normal(8).astype(np.float32),
        "zero": np.float32(0),
    }
    used = {
        k: v for k, v in weights.items() if f"{k}," in NETWORKS[name] or f"{k})" in NETWORKS[name]
    }
    return sketch(f"(float[n,8,6,6] x) => (float[n,12,1,1] y) {{ {NETWORKS[name]} }}", used)


def noise(model: ir.Model, reference: onnx.ModelProto, feeds: list) -> float:
    a, b = (open_session(p.SerializeToString()) for p in (reference, ir.to_proto(model)))
    return sum(float(((a.run(None, f)[0] - b.run(None, f)[0]) ** 2).sum()) for f in feeds)


@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_rounding_is_nearer_than_rounding_each_layer_alone(name):
    proto = network(name)
    model = normalized(proto)
    config = QuantConfig(bits=4, mode="weight_only", layer_bits={"*": 4})
    plan = make_plan(model, config, TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(24)]
    stats = observe(proto.SerializeToString(), plan, feeds)

    sequential = round_sequentially(model, plan, stats, feeds)
    alone = Statistics(
        stats.tensors,
        stats.means,
        gram_matrices(proto.SerializeToString(), matmul_inputs(model, plan), feeds),
    )

    assert set(sequential.rounding_targets) == set(matmul_inputs(model, plan))
    assert noise(apply_plan(model, plan, sequential).model, proto, feeds) < noise(
        apply_plan(model, plan, alone).model, proto, feeds
    )


class AfterOneLayer(Deadline):
    """A deadline that is over once the first layer is rounded."""

    def __init__(self) -> None:
        super().__init__(0.0, np.inf)
        object.__setattr__(self, "looks", [False, True])

    @property
    def is_over(self) -> bool:
        return self.looks.pop(0)


def test_layers_that_there_is_no_time_for_are_fitted_to_the_inputs_of_the_float_model():
    proto = network("a chain")
    model = normalized(proto)
    config = QuantConfig(bits=4, mode="weight_only", layer_bits={"*": 4})
    plan = make_plan(model, config, TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(24)]
    stats = observe(proto.SerializeToString(), plan, feeds)

    cut_short = round_sequentially(model, plan, stats, feeds, deadline=AfterOneLayer())

    first, second = (str(n.name) for n in model.graph if n.op_type == "Conv")
    assert (list(cut_short.rounding_targets), list(cut_short.gram_matrices)) == ([first], [second])
    to_nearest = replace(cut_short, gram_matrices={})
    assert noise(apply_plan(model, plan, cut_short).model, proto, feeds) < noise(
        apply_plan(model, plan, to_nearest).model, proto, feeds
    )


def test_the_target_of_the_first_layer_is_its_own_weight_and_the_model_stays_as_it_is():
    proto = network("a chain")
    model = normalized(proto)
    before = ir.to_proto(model).SerializeToString()
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only"), TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(4)]

    targets = round_sequentially(model, plan, observe(before, plan, feeds), feeds).rounding_targets

    first, second = (targets[str(n.name)] for n in model.graph if n.op_type == "Conv")
    weight = (
        onnx.numpy_helper.to_array(proto.graph.initializer[0]).transpose(0, 2, 3, 1).reshape(8, -1)
    )
    np.testing.assert_allclose(first.weight, weight, atol=1e-6)
    assert np.abs(second.weight).max() > 0
    assert ir.to_proto(model).SerializeToString() == before


def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch):
    monkeypatch.setattr("quant_core.model.layerwise.MAX_HELD_BYTES", 0)
    text = "(float[n,8,h,k] x) => (float[n,8,h,k] y) { a = Relu(x) y = Conv(a, w) }"
    model = normalized(sketch(text, weights(w=(8, 8, 1, 1))))
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only"), TARGETS["x86"])
    feed = {"x": np.random.default_rng(0).standard_normal((1, 8, 256, 256), np.float32)}

    def peak(samples: int) -> int:
        tracemalloc.start()
        round_sequentially(model, plan, Statistics(), [feed] * samples)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(16) < peak(4) + 2 * feed["x"].nbytes


def test_shrinkage_is_high_for_independent_inputs_and_low_for_correlated_ones():
    rng = np.random.default_rng(0)
    independent, correlated = rng.standard_normal((2, 1, 1, 256, 32), dtype=np.float32)
    correlated += 3 * correlated[..., :1]

    high, low = (
        shrinkage(x, x.swapaxes(2, 3) @ x.astype(float) / 256, batches=16).item()
        for x in (independent, correlated)
    )

    assert high > 0.8
    assert low < 0.1


@pytest.mark.parametrize("k", [4, 64])
def test_shrinkage_is_the_estimated_variance_over_the_square_of_off_diagonal_elements(k):
    rows = np.random.default_rng(1).standard_normal((1, 1, 60, k), dtype=np.float32)
    rows += rows[..., :1]
    x = rows[0, 0].astype(np.float64)
    off_diagonal = ~np.eye(k, dtype=bool)
    products = np.array([(batch.T @ batch)[off_diagonal] for batch in np.split(x, 6)])
    variance_of_sum = 6 * products.var(axis=0, ddof=1)

    found = shrinkage(rows, (x.T @ x / 60)[None, None], batches=6).item()

    expected = variance_of_sum.sum() / np.square(products.sum(axis=0)).sum()
    assert found == pytest.approx(expected, rel=1e-4)


def test_inputs_that_are_0_in_all_of_a_few_samples_count_though_less_than_all_others():
    """Words of a text: most are in none of a few."""
    proto = sketch("(float[n,256] x) => (float[n,16] y) { y = MatMul(x, w) }", weights(w=(256, 16)))
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only"), TARGETS["x86"])
    words = np.random.default_rng(0).integers(0, 256, (12, 12))
    feeds = [{"x": np.eye(256, dtype=np.float32)[text].sum(0)[None]} for text in words]

    (target,) = round_sequentially(model, plan, Statistics(), feeds).rounding_targets.values()

    weight_of_word = np.einsum("kk->k", target.gram[0, 0])
    is_seen = np.isin(np.arange(256), words)
    assert weight_of_word[~is_seen].min() > 0
    assert weight_of_word[~is_seen].max() < weight_of_word[is_seen].min()


def test_shrinkage_does_not_depend_on_the_unit_of_the_inputs():
    rows = np.random.default_rng(0).standard_normal((1, 1, 64, 8), dtype=np.float32)
    gram = rows.swapaxes(2, 3) @ rows / np.float32(64)

    large = shrinkage(rows * np.float32(1e17), gram.astype(np.float64) * 1e34, batches=4)

    np.testing.assert_allclose(large, shrinkage(rows, gram.astype(np.float64), 4), rtol=1e-4)


def test_depthwise_weights_in_8_bits_have_no_rounding_target():
    proto = sketch(
        "(float[n,8,6,6] x) => (float[n,12,6,6] y) { "
        "d = Conv<group = 8, pads = [1, 1, 1, 1]>(x, w) y = Conv(d, v) }",
        {"w": np.ones((8, 1, 3, 3), np.float32), "v": np.ones((12, 8, 1, 1), np.float32)},
    )
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(bits=4, mode="static"), TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(4)]

    targets = round_sequentially(
        model, plan, observe(proto.SerializeToString(), plan, feeds), feeds
    ).rounding_targets

    assert list(targets) == [model.graph[1].name]


def test_targets_are_of_the_inputs_that_the_quantized_model_has():
    """Rounded activations, and what layers before give, of which those in 8 bits have no target."""
    proto = sketch(
        "(float[n,8,6,6] x) => (float[n,12,6,6] y) { a = Conv(x, u)  r = Relu(a) "
        "d = Conv<group = 8, pads = [1, 1, 1, 1]>(r, w)  y = Conv(d, v) }",
        weights(u=(8, 8, 1, 1), w=(8, 1, 3, 3), v=(12, 8, 1, 1)),
    )
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(bits=4, mode="static"), TARGETS["x86"])
    feeds = [random_feed(proto, seed, 4) for seed in range(4)]
    stats = observe(proto.SerializeToString(), plan, feeds)

    sequential = round_sequentially(model, plan, stats, feeds)

    quantized = apply_plan(model, plan, sequential)
    names = [str(n.name) for n in model.graph if n.op_type == "Conv"]
    for name in (names[0], names[2]):
        target = sequential.rounding_targets[name]
        tensor = str(quantized.written[name].inputs[0].name)
        found = np.stack([v[tensor] for v in values_of(quantized.model, [tensor], feeds)])
        np.testing.assert_allclose(target.input_means[0], found.mean((0, 1, 3, 4)), atol=1e-4)
        shrunk = _shrunk_covariance(found)
        least = 1e-3 * shrunk.diagonal().min()
        np.testing.assert_allclose(target.gram[0, 0], shrunk, rtol=1e-3, atol=least)


def _shrunk_covariance(found: NDArray[np.float32]) -> NDArray[np.float64]:
    """(k, k), of inputs (samples, 1, k, ...): what is chance is that of independent inputs."""
    rows = np.moveaxis(found, 2, -1).reshape(-1, found.shape[2])
    rows = rows - rows.mean(0)
    covariance = rows.T @ rows.astype(np.float64) / len(rows)
    chance = shrinkage(rows[None, None], covariance[None, None], batches=16).item()
    mean = np.trace(covariance) / len(covariance)
    return (1 - chance) * covariance + chance * mean * np.eye(len(covariance))


def test_inputs_that_are_all_alike_leave_weights_where_they_are():
    """But for the last digit of float32, of which no target can be made."""
    proto = sketch(
        "(float[n,64] x) => (float[n,8] y) { a = MatMul(x, u)  r = Tanh(a)  y = MatMul(r, v) }",
        weights(u=(64, 64), v=(64, 8)),
    )
    model = normalized(proto)
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only"), TARGETS["x86"])
    rng = np.random.default_rng(0)
    one = random_feed(proto, 0, 1)["x"]
    feeds = [{"x": one * (1 + 1e-7 * rng.standard_normal(one.shape, np.float32))} for _ in range(8)]
    stats = observe(proto.SerializeToString(), plan, feeds)

    targets = round_sequentially(model, plan, stats, feeds).rounding_targets

    for node in model.graph:
        if node.op_type == "MatMul":
            weight = node.inputs[1].const_value.numpy()
            np.testing.assert_allclose(targets[str(node.name)].weight, weight.T, atol=0.02)


@pytest.mark.parametrize("least", [0.0, 1e6])
def test_rows_that_the_rounded_model_chooses_otherwise_are_no_pairs(least):
    """Rounding changes how many rows are chosen; of those beyond 1e6 there are none."""
    arrays = weights(w=(32, 32), v=(32, 8)) | {"least": np.float32(least), "k": np.array([0])}
    text = """(float[64,32] x) => (float[n,8] y) {
        a = MatMul(x, w) c = Gather<axis = 1>(a, k) g = Greater(c, least)
        i = NonZero(g) t = Gather(i, k) r = Squeeze(t, k) b = Gather(a, r) y = MatMul(b, v)
    }"""
    proto = sketch(text, arrays)
    model = normalized(proto)
    config = QuantConfig(bits=4, mode="weight_only", layer_bits={"*": 4})
    plan = make_plan(model, config, TARGETS["x86"])
    feeds = [random_feed(proto, seed) for seed in range(8)]
    stats = observe(proto.SerializeToString(), plan, feeds)

    found = round_sequentially(model, plan, stats, feeds)

    targets = [target.weight for target in found.rounding_targets.values()]
    assert len(targets) == (1 if least else 2)
    assert all(np.isfinite(weight).all() for weight in targets)
