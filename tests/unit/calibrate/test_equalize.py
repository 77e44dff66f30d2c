"""Equalization makes channels between Convs more alike, while the model computes the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.api import quantize_model
from quant_core.calibrate.equalize import (
    METADATA,
    channel_maxima,
    equalize,
    equalized_like,
)
from quant_core.calibrate.gram import ScaledGrams, gram_matrices
from quant_core.calibrate.matmul_inputs import matmul_inputs
from quant_core.calibrate.scale_groups import scale_groups
from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from quant_core.judging import validate_model
from quant_core.model.session import open_session
from quant_core.plan.make import QuantPlan, make_plan
from quant_core.plan.targets import TARGETS
from tests.models import normalized, sketch
from tests.oracle.cases import weights

X = np.random.default_rng(0).standard_normal((32, 3, 12, 12), dtype=np.float32)
INPUT, IMAGE, VECTOR = "(float[n,3,12,12] x)", "(float[n,c,h,w] y)", "(float[n,c] y)"
ARRAYS = weights(
    u=(16, 3, 3, 3),
    b=(16,),
    d=(16, 1, 3, 3),
    v=(16, 16, 1, 1),
    w=(16, 5),
    k=(16, 4, 1, 1),
    s=(16, 3, 1, 1),
)
SCALABLE = {
    "a Relu between": (f"{INPUT} => {IMAGE} {{ a = Conv(x, u, b) r = Relu(a) y = Conv(r, v) }}", 1),
    "depthwise": (
        f"{INPUT} => {IMAGE} {{ a = Conv(x, u) r = Relu(a) e = Conv<group = 16>(r, d) "
        f"y = Conv(e, v) }}",
        2,
    ),
    "groups": (f"{INPUT} => {IMAGE} {{ a = Conv(x, u) r = Relu(a) y = Conv<group = 4>(r, k) }}", 1),
    "a shortcut": (
        f"{INPUT} => {VECTOR} {{ a = Conv(x, u, b) r = Relu(a) e = Conv(r, v) f = Add(e, r) "
        f"g = Relu(f) "
        "p = GlobalAveragePool(g) q = Flatten(p) y = Gemm(q, w) }",
        1,
    ),
    "a pool": (
        f"{INPUT} => {IMAGE} {{ a = Conv(x, u) p = MaxPool<kernel_shape = [2, 2]>(a) "
        "r = LeakyRelu(p) y = Conv(r, v) }",
        1,
    ),
}
NOT_SCALABLE = {
    "a Clip": f"{INPUT} => {IMAGE} {{ a = Conv(x, u) r = Clip(a, zero, six) y = Conv(r, v) }}",
    "a Sigmoid": f"{INPUT} => {IMAGE} {{ a = Conv(x, u) r = Sigmoid(a) y = Conv(r, v) }}",
    "an output": f"{INPUT} => (float[n,c,h,w] y, float[n,c,h,w] r) {{ a = Conv(x, u) r = Relu(a) "
    f"y = Conv(r, v) }}",
    "an input": f"{INPUT} => {IMAGE} {{ a = Conv(x, t) r = Relu(a) f = Add(r, x) y = Conv(f, s) }}",
    "a constant": f"{INPUT} => {IMAGE} {{ a = Conv(x, u) r = Add(a, one) y = Conv(r, v) }}",
    "a weight that two share": f"{INPUT} => {IMAGE} {{ a = Conv(x, s) r = Relu(a) e = Conv(r, v) "
    f"y = Conv(e, v) }}",
    "a flattened image": f"{INPUT} => {VECTOR} {{ a = Conv(x, u) r = Relu(a) q = Flatten(r) "
    f"y = MatMul(q, big) }}",
}


def model_of(text: str) -> ir.Model:
    arrays = {**ARRAYS, **weights(t=(3, 3, 1, 1), big=(1600, 4))}
    numbers = {"zero": np.float32(0), "six": np.float32(6), "one": np.ones((16, 1, 1), np.float32)}
    named = {
        n: a for n, a in {**arrays, **numbers}.items() if any(f" {n}{end}" in text for end in ",)")
    }
    scale = np.where(np.arange(16) < 8, 100, 1).astype(np.float32).reshape(-1, 1, 1)
    if "u" in named:
        named["u"] = named["u"] * scale[..., None]
    if "v" in named:  # what reads them makes up for it
        named["v"] = named["v"] / scale
    return normalized(sketch(text, named))


def run(model: ir.Model) -> np.ndarray:
    return open_session(ir.to_proto(model).SerializeToString()).run(None, {"x": X})[0]


@pytest.mark.parametrize("case", SCALABLE)
def test_an_equalized_model_computes_the_same_from_channels_more_alike(case: str) -> None:
    text, count = SCALABLE[case]
    model = model_of(text)
    output = run(model)

    made, _ = equalize(model, [{"x": X}]) or (None, {})

    assert made is not None
    assert len(scale_groups(model)) == count
    np.testing.assert_allclose(run(made), output, rtol=1e-4, atol=1e-4 * np.abs(output).max())
    np.testing.assert_array_equal(run(model), output)
    before, after = (channel_maxima(m, {"r": 1}, [{"x": X}])["r"] for m in (model, made))
    assert after.max() / after.min() < 0.5 * before.max() / before.min()


@pytest.mark.parametrize("case", SCALABLE)
def test_gram_matrices_of_an_equalized_model_need_no_samples(case: str) -> None:
    model = model_of(SCALABLE[case][0])
    made, factors = equalize(model, [{"x": X}]) or (model, {})
    inputs = matmul_inputs(model, make_plan(model, QuantConfig(), TARGETS["x86-vnni"]))
    first = gram_matrices(model, inputs, [{"x": X}])

    scaled = ScaledGrams(first, inputs, factors)

    measured = gram_matrices(made, inputs, [{"x": X}])
    assert len(factors) >= 2
    assert list(scaled) == list(measured)
    for node, gram in scaled.items():
        np.testing.assert_allclose(gram, measured[node], rtol=1e-3, atol=1e-5 * np.abs(gram).max())


@pytest.mark.parametrize("case", NOT_SCALABLE)
def test_channels_around_an_operator_that_passes_no_scale_on_stay_as_they_are(case: str) -> None:
    assert equalize(model_of(NOT_SCALABLE[case]), [{"x": X}]) is None


@pytest.mark.parametrize("count", [16, 32])
def test_equalization_is_done_where_it_helps_and_its_plan_makes_the_same_bytes(
    tmp_path: Path, count: int
) -> None:
    proto = ir.to_proto(model_of(SCALABLE["a Relu between"][0]))
    onnx.save(proto, tmp_path / "m.onnx")
    config = QuantConfig.from_dict({"mode": "static"})

    samples = X[:count]

    found = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", config, calibration=samples)

    assert found.plan.equalized_db > 3
    assert bool(found.plan.holdout) == (count == 32)
    plan = QuantPlan.from_json(found.plan.to_json())
    assert plan == found.plan
    again = quantize_model(
        tmp_path / "m.onnx", tmp_path / "again.onnx", plan=plan, calibration=samples
    )
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()
    assert again.plan.equalized_db == found.plan.equalized_db
    checked = validate_model(tmp_path / "m.onnx", tmp_path / "q.onnx", samples, detailed=True)
    assert checked.fidelity.per_output[0].sqnr_db > 25
    reported = {row["node"]: (row["isolated_db"], row["cumulative_db"]) for row in found.layers}
    assert {
        row["node"]: (row["isolated_db"], row["cumulative_db"]) for row in checked.sensitivity
    } == reported


def test_the_metadata_of_an_equalized_model_is_enough_to_equalize_its_original() -> None:
    model = model_of(SCALABLE["a shortcut"][0])
    made, _ = equalize(model, [{"x": X}]) or (model, {})

    again = equalized_like(model, made)

    assert equalized_like(made, made) is made
    assert equalized_like(model, model) is model
    np.testing.assert_array_equal(run(again), run(made))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "cannot be read"),
        ('["r"]', "cannot be read"),
        ('{"a": "?"}', "cannot be read"),
        ('{"a": 1}', "cannot be read"),
        ('{"a": "ADwAPA=="}', "other channels of a"),
        ('{"b": ""}', "other channels of b"),
    ],
)
def test_metadata_that_is_not_about_the_model_is_refused(text: str, problem: str) -> None:
    model = model_of(SCALABLE["a Relu between"][0])
    other = model.clone()
    other.metadata_props[METADATA] = text

    with pytest.raises(ModelError, match=problem):
        equalized_like(model, other)


NORMALIZED = "r = LayerNormalization<axis = -1>(x, g, b) q = MatMul(r, w) v = MatMul(r, u)"
PRODUCTS = {
    "alone": f"{NORMALIZED} y = Add(q, v)",
    "beside a shortcut": f"{NORMALIZED} p = Add(q, v) y = Add(p, r)",
}
ROWS = np.random.default_rng(0).standard_normal((16, 8, 32), dtype=np.float32)


def normalized_products(case: str, largest: float = 100) -> ir.Model:
    """Two products of normalized rows with one large channel in eight."""
    gain = np.where(np.arange(32) % 8, 1, largest).astype(np.float32)
    arrays = weights(w=(32, 32), u=(32, 32), b=(32,))
    arrays = arrays | {n: arrays[n] / gain[:, None] for n in "wu"} | {"g": gain}
    return normalized(
        sketch(f"(float[n,8,32] x) => (float[n,8,32] y) {{ {PRODUCTS[case]} }}", arrays)
    )


def run_rows(model: ir.Model) -> np.ndarray:
    return open_session(ir.to_proto(model).SerializeToString()).run(None, {"x": ROWS})[0]


@pytest.mark.parametrize(("case", "more_nodes"), [("alone", 0), ("beside a shortcut", 1)])
def test_what_a_normalization_writes_for_products_is_equalized(case: str, more_nodes: int) -> None:
    model = normalized_products(case)
    output = run_rows(model)

    made, factors = equalize(model, [{"x": ROWS}], ["r"]) or (model, {})

    assert list(factors) == ["r"]
    assert len(made.graph) == len(model.graph) + more_nodes
    np.testing.assert_allclose(run_rows(made), output, rtol=1e-4, atol=1e-4 * np.abs(output).max())
    before, after = (channel_maxima(m, {"r": -1}, [{"x": ROWS}])["r"] for m in (model, made))
    assert after.max() / after.min() < 0.5 * before.max() / before.min()


def test_nothing_is_multiplied_unless_that_is_allowed_and_gains_enough() -> None:
    unequal, equal = (normalized_products("beside a shortcut", size) for size in (100, 1))

    assert equalize(unequal, [{"x": ROWS}]) is None
    assert equalize(equal, [{"x": ROWS}], ["r"]) is None


def test_a_static_plan_multiplies_inputs_of_products_and_makes_the_same_bytes_again(
    tmp_path: Path,
) -> None:
    onnx.save(ir.to_proto(normalized_products("beside a shortcut")), tmp_path / "m.onnx")
    config = QuantConfig(mode="static", target="x86-vnni")

    found = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", config, calibration=ROWS)

    assert found.plan.equalized_db > 3
    plan = QuantPlan.from_json(found.plan.to_json())
    quantize_model(tmp_path / "m.onnx", tmp_path / "again.onnx", plan=plan, calibration=ROWS)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()
    checked = validate_model(tmp_path / "m.onnx", tmp_path / "q.onnx", ROWS, detailed=True)
    assert {row["node"] for row in checked.sensitivity} >= {"q", "v"}


def test_a_product_that_shares_a_table_is_not_scaled():
    """Its integers would no longer be those of the table, which would be stored beside them."""
    text = """(int64[n] ids) => (float[n,40] y) {
        e = Gather(table, ids) t = Tanh(e) y = MatMul(t, turned)
    }"""
    table = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    table[:, 0] *= 100
    model = normalized(sketch(text, {"table": table, "turned": table.T.copy()}))

    assert equalize(model, [{"ids": np.arange(9)}], multiplied=["t"]) is None
