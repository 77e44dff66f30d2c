"""Gram matrices are those of the rows that the kernel multiplies the weight with."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate import gram
from quant_core.calibrate.gram import MIN_GRAM_ROWS, gram_matrices
from quant_core.calibrate.matmul_inputs import inputs_of_weights, matmul_inputs
from quant_core.config import QuantConfig
from quant_core.plan.make import make_plan
from quant_core.plan.operators import layout_of
from quant_core.plan.targets import TARGETS
from tests.models import normalized, random_feed, sketch

RNG = np.random.default_rng(0)
IMAGE = "(float[n,4,7,6] x) => (float[n,8,h,k] y)"


def measured(model: onnx.ModelProto, feeds: list) -> tuple[ir.Node, np.ndarray]:
    """The one anchor of a model, and its Gram matrices."""
    graph = normalized(model)
    plan = make_plan(graph, QuantConfig(mode="static"), TARGETS["x86"])
    found = gram_matrices(model.SerializeToString(), matmul_inputs(graph, plan), feeds)
    return graph.graph[0], found["y"]


def outputs(model: onnx.ModelProto, feeds: list) -> np.ndarray:
    from quant_core.model.session import open_session

    session = open_session(model.SerializeToString())
    return np.concatenate(
        [np.moveaxis(session.run(None, feed)[0], 1, -1).reshape(-1, 8) for feed in feeds]
    )


@pytest.mark.parametrize(
    ("attributes", "shape"),
    [
        ("", (8, 4, 3, 3)),
        ("pads = [1, 1, 1, 1], ", (8, 4, 3, 3)),
        ("pads = [0, 1, 2, 0], strides = [2, 1], ", (8, 4, 3, 2)),
        ("dilations = [2, 2], ", (8, 4, 2, 3)),
        ("group = 2, ", (8, 2, 3, 3)),
        ("group = 4, ", (8, 1, 3, 3)),
        ('auto_pad = "VALID", ', (8, 4, 3, 3)),
    ],
)
def test_a_conv_output_has_the_variance_that_the_gram_matrix_says(attributes, shape, monkeypatch):
    """Var[w . x] = w^T G w for any w, if rows are im2col's in the weight's column order."""
    monkeypatch.setattr(gram, "MIN_ROWS_PER_COLUMN", MIN_GRAM_ROWS)
    kernel = f"kernel_shape = [{shape[2]}, {shape[3]}]"
    weight = RNG.standard_normal(shape, np.float32)
    model = sketch(f"{IMAGE} {{ y = Conv<{attributes}{kernel}>(x, w) }}", {"w": weight})
    feeds = [{"x": feed["x"] + 1} for feed in (random_feed(model, seed) for seed in range(3))]

    node, found = measured(model, feeds)

    rows = layout_of(node, 4).matrix(node.inputs[1].const_value.numpy()).astype(np.float64)
    grouped = rows.reshape(len(found), -1, rows.shape[1])
    assert len(outputs(model, feeds)) <= MIN_GRAM_ROWS  # so that every row counts
    np.testing.assert_allclose(
        np.einsum("gok,gkl,gol->go", grouped, found[:, 0], grouped).ravel(),
        outputs(model, feeds).var(0),
        rtol=1e-3,
    )


def test_a_gemm_has_moments_about_the_mean_and_a_matmul_about_zero():
    """A Gemm's bias takes up the mean of what rounding shifts, a MatMul has none."""
    w = RNG.standard_normal((6, 8), np.float32)
    gemm, matmul = (
        sketch(f"(float[n,6] x) => (float[n,8] y) {{ y = {op}(x, w) }}", {"w": w})
        for op in ("Gemm", "MatMul")
    )
    feeds = [{"x": feed["x"] + 1} for feed in (random_feed(gemm, seed, 50) for seed in range(3))]
    x = np.concatenate([feed["x"] for feed in feeds]).astype(np.float64)

    np.testing.assert_allclose(
        measured(gemm, feeds)[1][0, 0],
        np.cov(x.T, bias=True),
        atol=1e-5 * (x**2).mean(0).max() + 1e-5,
    )
    np.testing.assert_allclose(measured(matmul, feeds)[1][0, 0], x.T @ x / len(x), rtol=1e-4)


def test_the_split_into_feeds_does_not_matter():
    model = sketch(
        "(float[n,6] x) => (float[n,8] y) { y = Gemm(x, w) }",
        {"w": RNG.standard_normal((6, 8), np.float32)},
    )
    whole = random_feed(model, n=30)["x"]

    at_once, one_by_one = (
        measured(model, [{"x": whole}])[1],
        measured(model, [{"x": row[None]} for row in whole])[1],
    )

    np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)


def test_a_weight_that_nodes_share_has_the_matrix_of_the_first_of_their_inputs():
    text = "(float[n,4] x) => (float[n,4] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    model = sketch(text, {"w": RNG.standard_normal((4, 4), np.float32)})
    graph = normalized(model)
    plan = make_plan(graph, QuantConfig(mode="static"), TARGETS["x86"])
    inputs = inputs_of_weights(graph, plan)

    found = gram_matrices(model.SerializeToString(), inputs, [random_feed(model, 0)])

    assert {node: source.tensor for node, source in inputs.items()} == {"h": "x", "y": "x"}
    assert found["h"] is found["y"]
