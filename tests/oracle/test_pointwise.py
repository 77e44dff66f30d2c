"""1x1 Convs that a search chose to compute dynamically: products of integers, pixel by pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, optimized_graph, run
from quant_core.plan.make import QuantPlan
from quant_core.plan.types import Compute, OutlierTreatment
from quant_core.rewrite.apply import apply_plan
from tests.models import sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import Made, make, planned, prepare_proto, sqnr_db

SIZES = {1: "9", 2: "5,7", 3: "3,4,5"}


def two_convs(
    dims: int = 2, *, bias: bool = True, attributes: str = "", kernel: int = 1, relu: bool = True
) -> onnx.ModelProto:
    """x -> Conv a -> Relu -> Conv y, of so many dimensions behind the channels."""
    arrays = weights(u=(24, 16, *[kernel] * dims), v=(8, 24, *[1] * dims), b=(24,))
    operands = "u, b" if bias else "u"
    act = "r = Relu(a)" if relu else "r = Identity(a)"
    text = f"""(float[n,16,{SIZES[dims]}] x) => (float[n,8,{",".join("pqr"[:dims])}] y) {{
        a = Conv{attributes}(x, {operands}) {act} y = Conv(r, v)
    }}"""
    return sketch(text, arrays if bias else {k: a for k, a in arrays.items() if k != "b"})


def made_of(model: onnx.ModelProto, dynamic: str, **options: object) -> tuple[Made, float]:
    """The model with these nodes computing dynamically, and its SQNR in dB."""
    given = prepare_proto(model)
    made = make(given, compute=dict.fromkeys(dynamic.split(), Compute.DYNAMIC), **options)
    onnx.checker.check_model(made.model, full_check=True)
    return made, sqnr_db(given.floats(), made.outputs(given.feeds))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", SIZES)
def test_a_pointwise_conv_multiplies_integers_in_one_kernel(dims, bias, bits):
    made, near_db = made_of(two_convs(dims, bias=bias), "a y", bits=bits, layer_bits={"*": bits})

    assert {planned(made.plan, name).compute for name in "ay"} == {"dynamic"}
    assert near_db > (30 if bits == 8 else 12)
    assert made.kernels().count("DynamicQuantizeMatMul") == 2
    assert "Conv" not in made.kernels()
    model = ir.from_proto(made.model)
    normalize(model)
    assert not saturating_nodes(model)


def test_the_plan_makes_the_same_bytes_again():
    given = prepare_proto(two_convs())
    made = make(given, compute={"a": Compute.DYNAMIC, "y": Compute.DYNAMIC})

    plan = QuantPlan.from_json(made.plan.to_json())

    again = ir.to_proto(apply_plan(given.model, plan, made.stats).model)
    assert again.SerializeToString() == made.model.SerializeToString()


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("<strides = [2, 2]>", 1),
        ("<pads = [1, 1, 1, 1]>", 1),
        ("<pads = [1, 1, 1, 1]>", 3),
    ],
)
def test_other_convs_compute_as_the_mode_says(attributes, kernel):
    made, near_db = made_of(
        two_convs(attributes=attributes, kernel=kernel), "a", mode="static", weight_method="rtn"
    )

    assert planned(made.plan, "a").compute == "static"
    assert near_db > 30


def test_a_mode_alone_computes_no_conv_dynamically():
    made, _ = made_of(two_convs(), "", mode="dynamic")

    assert planned(made.plan, "a").compute == "float"


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_a_target_without_dynamic_kernels_has_none(target):
    given = prepare_proto(two_convs())

    made = make(given, target, compute={"a": Compute.DYNAMIC}, mode="static")

    assert planned(made.plan, "a").compute == "static"


def test_an_excluded_conv_stays_float():
    made, _ = made_of(two_convs(), "a y", exclude=["a"])

    assert {name: str(planned(made.plan, name).compute) for name in "ay"} == {
        "a": "float", "y": "dynamic"
    }  # fmt: skip


def test_convs_that_read_one_tensor_quantize_it_once():
    text = """(float[n,16,5,5] x) => (float[n,8,5,5] y) {
        a = Conv(x, u) b = Conv(x, v) y = Add(a, b)
    }"""
    made, near_db = made_of(sketch(text, weights(u=(8, 16, 1, 1), v=(8, 16, 1, 1))), "a b")

    assert near_db > 30
    assert [n.op_type for n in made.model.graph.node].count("DynamicQuantizeLinear") == 1


@pytest.mark.parametrize("dynamic", ["a", "s", "a s"])
def test_a_weight_that_convs_share_is_stored_once(dynamic):
    text = """(float[n,16,5,5] x) => (float[n,16,5,5] y) {
        a = Conv(x, u) r = Relu(a) s = Conv(r, u) y = Relu(s)
    }"""
    made, near_db = made_of(
        sketch(text, weights(u=(16, 16, 1, 1))), dynamic, mode="static", weight_method="rtn"
    )

    assert near_db > 30
    assert sum(np.prod(i.dims) == 256 for i in made.model.graph.initializer) == 1


@pytest.mark.parametrize("split", [(), (3,)], ids=["whole", "split"])
@pytest.mark.parametrize("smooth", [False, True], ids=["as it is", "smooth"])
def test_a_channel_of_pixels_that_is_larger_than_others_is_treated(smooth, split):
    given = prepare_proto(two_convs())
    for feed in given.feeds:
        feed["x"][:, 3] *= 100
    made = make(given, compute={"a": Compute.DYNAMIC}, exclude=["y"])
    treated = replace(made.plan, outliers={"x": OutlierTreatment(smooth, split, 0.0)})
    found = ir.to_proto(apply_plan(given.model, treated, made.stats).model)

    outputs = [run(open_session(found.SerializeToString()), feed) for feed in given.feeds]

    without_db = sqnr_db(given.floats(), made.outputs(given.feeds))
    gain_db = sqnr_db(given.floats(), outputs) - without_db
    assert gain_db > 5 if smooth or split else gain_db == 0


def test_layouts_cancel_between_pointwise_convs_when_the_model_loads():
    made, _ = made_of(two_convs(), "a y")

    ran = [n.op_type for n in optimized_graph(made.model.SerializeToString()).graph.node]
    assert ran.count("Transpose") == 2
