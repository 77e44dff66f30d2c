"""A plan says what becomes of every node and why, and obeys what was asked."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from quant_core.api import plan_model
from quant_core.config import QuantConfig
from quant_core.errors import ModelError, RequestError
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, QuantPlan, Storage
from tests.models import normalized, sketch, tiny_cnn
from tests.oracle.cases import CASES, weights
from tests.oracle.quantizing import planned

AVX2 = TARGETS["x86"]


def plan_of(model: onnx.ModelProto | str, compute=None, **options: object) -> QuantPlan:
    proto = CASES[model]() if isinstance(model, str) else model
    choices = {node: NodeChoice(Compute(way)) for node, way in (compute or {}).items()}
    return make_plan(normalized(proto), QuantConfig.from_dict(options), AVX2, choices)


def chosen(plan: QuantPlan) -> dict[str, tuple[str, str]]:
    """Node with a weight -> (compute, storage)."""
    return {n.node: (n.compute, n.storage) for n in plan.nodes if n.weights}


def test_a_plan_survives_json():
    for case in (
        "residual",
        "two_stacked_lstms",
        "an_embedding_tied_to_the_output",
        "a_branch_with_weights_of_its_own",
    ):
        plan = plan_of(case, bits=4, layer_bits={"x*": 32}, exclude=["nothing"])

        assert QuantPlan.from_json(plan.to_json()) == plan
        assert json.loads(plan.to_json()) == plan.to_dict()


def test_levels_of_4_bits_may_be_uneven_where_nodes_look_them_up():
    """MatMulNBits and tables take even ones; nor may OpenVINO fold what looks others up."""
    proto = CASES["an_embedding_tied_to_the_output"]()
    config = QuantConfig(bits=4, layer_bits={"*": 4}, min_elements=0)

    def may_be_uneven(target: str, *in_blocks: str) -> dict[str, bool]:
        choices = dict.fromkeys(in_blocks, NodeChoice(Compute.BLOCKS))
        plan = make_plan(normalized(proto), config, TARGETS[target], choices)
        found = {n.node: n.granularity for n in plan.nodes if n.storage is Storage.INT4}
        return {node: how.may_be_uneven for node, how in found.items()}

    assert may_be_uneven("x86") == {"e": False, "h": True, "y": False}  # y has the table's rows
    assert may_be_uneven("x86", "h", "y") == {"e": False, "h": False, "y": False}
    assert may_be_uneven("portable") == {"h": False}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}}', "null", '{"target": 3}'])
def test_what_is_no_plan_is_a_request_error(text):
    with pytest.raises(RequestError):
        QuantPlan.from_json(text)


def test_a_plan_decides_once_about_a_node():
    values = plan_of("residual").to_dict()
    values["nodes"].append(values["nodes"][0])

    with pytest.raises(RequestError, match=f"names node {values['nodes'][0]['node']} 2 times"):
        QuantPlan.from_dict(values)


@pytest.mark.parametrize(
    ("mode", "conv", "gemm", "lstm", "table"),
    [
        ("static", "static", "static", "float", "float"),
        ("dynamic", "float", "dynamic", "dynamic", "float"),
        ("weight_only", "float", "float", "float", "float"),
        ("auto", "static", "static", "dynamic", "float"),
    ],
)
def test_each_mode_computes_what_can_its_way_and_says_why_the_rest_does_not(
    mode, conv, gemm, lstm, table
):
    expected = {"Conv": conv, "Gemm": gemm, "LSTM": lstm, "Gather": table}
    for case in ("residual", "lstm", "an_embedding_alone"):
        for node in plan_of(case, mode=mode).nodes:
            if node.weights:
                assert (node.compute, node.storage) == (expected[node.op_type], "int8")
                assert node.reason or node.compute != "float"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("gemm_with_transposed_input", "transA"),
        ("gemm_with_alpha", "alpha"),
        ("gemm_with_beta", "beta"),
        ("a_stack_of_matrices", "stack"),
        ("gru", "GRU"),
        ("transposed_convolution", "ConvTranspose"),
    ],
)
def test_what_cannot_compute_in_integers_says_what_stands_in_the_way(case, reason):
    float_nodes = [n for n in plan_of(case, mode="static").nodes if n.compute == "float"]

    assert [n.storage for n in float_nodes] == [
        "int8"
    ]  # the weight is stored in 8 bits all the same
    assert reason in float_nodes[0].reason


def test_weights_in_a_branch_are_weight_only():
    plan = plan_of("a_branch_with_weights_of_its_own", mode="static")

    assert chosen(plan) == {"a": ("static", "int8"), "p": ("float", "int8"), "q": ("float", "int8")}


@pytest.mark.parametrize(
    ("options", "float_nodes"),
    [
        ({"exclude": ["conv"]}, ("conv",)),
        ({"exclude": ["g*"]}, ("gemm",)),
        ({"exclude": ["w"]}, ("conv",)),
        ({"exclude": ["*"]}, ("conv", "gemm")),
        ({"exclude": ["CONV", "con", ""]}, ()),
        ({"layer_bits": {"conv": 32}}, ("conv",)),
        ({"layer_bits": {"*": 32, "gemm": 8}}, ("conv",)),
        ({"layer_bits": {"gemm": 8, "*": 32}}, ("conv", "gemm")),
        ({"min_elements": 161}, ("gemm",)),
        ({"min_elements": 160}, ()),
        ({"min_elements": 10**6}, ("conv", "gemm")),
    ],
    ids=str,
)
def test_what_is_to_stay_float_stays_float_and_says_who_asked(options, float_nodes):
    plan = plan_of(tiny_cnn(), mode="static", **options)

    assert {node for node, (_, storage) in chosen(plan).items() if storage == "float32"} == set(
        float_nodes
    )
    key = next(iter(options))
    named = {"exclude": "excluded by", "layer_bits": "layer_bits", "min_elements": "min_elements"}[
        key
    ]
    assert all(named in n.reason for n in plan.nodes if n.node in float_nodes)
    assert all(n.compute == "float" for n in plan.nodes if n.node in float_nodes)


def test_layer_bits_mix_four_and_eight():
    text = "(float[n,64] x) => (float[n,8] y) { a = Gemm(x, u) b = Relu(a) y = Gemm(b, v) }"
    model = sketch(text, weights(u=(64, 64), v=(64, 8)))

    assert chosen(plan_of(model, bits=8, layer_bits={"a": 4}))["a"] == ("static", "int4")
    assert chosen(plan_of(model, bits=4, layer_bits={"v": 8})) == {
        "a": ("static", "int4"),
        "y": ("static", "int8"),
    }


def test_too_few_columns_for_four_bits_are_stored_in_eight():
    plan = plan_of(tiny_cnn(), bits=4)

    assert {n.node: n.storage for n in plan.nodes if n.weights} == {
        "conv": "int8",
        "gemm": "int8",
    }  # 27 and 16 columns
    assert "too few" in planned(plan, "gemm").reason


def test_the_plan_does_not_claim_int4_for_what_is_written_in_int8():
    table = sketch("(int64[n] ids) => (float[n,64] y) { y = Gather(w, ids) }", weights(w=(40, 64)))

    assert chosen(plan_of(table, bits=4)) == {"y": ("float", "int4")}
    assert chosen(plan_of(table, bits=4, runtime="qdq")) == {"y": ("float", "int8")}
    assert chosen(plan_of(table, bits=4, block_size=128)) == {"y": ("float", "int8")}
    assert chosen(plan_of("lstm", bits=4, mode="dynamic")) == {"s": ("dynamic", "int8")}


def test_a_node_that_cannot_compute_as_wanted_computes_as_the_mode_says():
    plan = plan_of(tiny_cnn(), {"conv": "dynamic", "gemm": "dynamic"}, mode="static")

    assert chosen(plan) == {"conv": ("static", "int8"), "gemm": ("dynamic", "int8")}


def test_movers_are_static_between_static_neighbours_only():
    model = sketch(
        """(float[n,4,8,8] x) => (float[n,4,6,6] y, float[n,4,3,3] z) {
            first = MaxPool<kernel_shape = [3, 3]>(x) y = Conv(first, w, b)
            last = AveragePool<kernel_shape = [4, 4]>(y) z = Tanh(last)
        }""".replace("[n,4,6,6]", "[n,4,h,k]"),
        weights(w=(4, 4, 1, 1), b=(4,)),
    )

    assert {n.node for n in plan_of(model, mode="static").nodes} == {"y"}


def test_a_mover_shares_the_parameters_of_its_input():
    plan = plan_of("every_mover_and_elementwise_operator", mode="static")

    assert plan.activations["m"] == plan.activations["l"] == "l"
    assert {plan.activations[t] for t in ("t", "r", "i", "o")} == {"h"}


def test_relu_and_clip_are_part_of_what_is_before_them():
    plan = plan_of("clip_and_constants_beside_activations", mode="static")

    assert "a" not in plan.activations
    assert {
        "c",
        "f",
    } <= plan.activations.keys()  # Clip(-1, 6) is no cap at zero: f itself is quantized


def test_only_inputs_of_rounded_weights_need_means():
    assert plan_of("residual", mode="static").means == {"x": (1,), "r": (1,), "f": (-1,)}
    assert plan_of("residual", mode="static", exclude=["a", "y"]).means == {"r": (1,)}
    assert plan_of("residual", mode="static", bias_correction=False).means == {}


def test_a_model_without_weights_has_nothing_to_quantize():
    with pytest.raises(ModelError, match="nothing to quantize"):
        plan_of(sketch("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }"))


def test_a_model_of_constants_is_refused_with_that_reason(tmp_path):
    text = "(float[n,4] x) => (float[4,4] y) { a = Relu(w) y = MatMul(a, w) }"
    onnx.save(sketch(text, {"w": np.eye(4, dtype=np.float32)}), tmp_path / "m.onnx")

    with pytest.raises(ModelError, match="computes nothing but constants"):
        plan_model(tmp_path / "m.onnx")


def test_weights_that_are_inputs_with_default_values_are_refused_with_that_reason():
    model = sketch(
        "(float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }", {"w": np.eye(4, dtype="f")}
    )
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 4]))

    with pytest.raises(ModelError, match="inputs, which whoever runs it may replace"):
        plan_of(model)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_finite_stays_float_and_others_do_not(bad):
    model = tiny_cnn()
    w = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[3, 1, 0, 0] = bad
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))

    plan = plan_of(model)

    assert chosen(plan)["conv"] == ("float", "float32")
    assert "w holds NaN or inf" in next(n.reason for n in plan.nodes if n.node == "conv")
    assert chosen(plan)["gemm"][1] == "int8"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[4,n] x) => (float[4,n] y) { y = Gemm(w, x) }", "left operand"),
        ("(float[n,4] x) => (float[n,4] y) { y = Sigmoid(x) }", r"operators \(Sigmoid\)"),
    ],
)
def test_a_refusal_says_what_the_model_has_instead_of_weights(text, reason):
    with pytest.raises(ModelError, match=reason):
        plan_of(sketch(text, {"w": np.ones((4, 4), np.float32)} if "w," in text else {}))


def test_a_refusal_says_where_the_weights_of_a_linear_model_are():
    model = sketch("(float[n,4] x) => (float[n,4] y) { y = Sigmoid(x) }", {})
    model.graph.node[0].CopyFrom(
        helper.make_node(
            "LinearRegressor", ["x"], ["y"], domain="ai.onnx.ml", targets=4, coefficients=[0.5] * 16
        )
    )

    with pytest.raises(ModelError, match="LinearRegressor holds its weights in attributes"):
        plan_of(model)


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_a_weight_that_one_node_stores_as_float16_is_no_wider_for_the_others(scale):
    text = "(float[n,32] x) => (float[n,32] z) { y = MatMul(x, w) r = Relu(y) z = MatMul(r, w) }"
    model = normalized(sketch(text, {"w": weights(w=(32, 32))["w"] * np.float32(scale)}))
    first = next(str(n.name) for n in model.graph if n.op_type == "MatMul")
    choices = {first: NodeChoice(storage=Storage.FLOAT16)}

    plan = make_plan(model, QuantConfig(), AVX2, choices)

    stored = {n.storage for n in plan.nodes if n.weights}
    assert stored == {Storage.FLOAT16 if scale == 1.0 else Storage.FLOAT32}


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_biases_of_recurrent_nodes_are_no_weights_that_stay_float(operator, gates):
    arrays = weights(w=(2, 16 * gates, 16), r=(2, 16 * gates, 16), b=(2, 32 * gates))
    text = f'y = {operator}<hidden_size = 16, direction = "bidirectional">(x, w, r, b)'

    plan = plan_of(sketch(f"(float[9,n,16] x) => (float[9,2,n,16] y) {{ {text} }}", arrays))

    assert plan.constants == {}


EXPERTS = """
    r = MatMul(x, router) b = Add(r, bias) p = Softmax(b) v, i = TopK<axis = -1>(p, one)
    j = Squeeze(i, last) e = Gather(experts, j) t = Unsqueeze(x, middle)
    y = MatMul(t, e)"""


def experts(router: int = 4, bits: int = 8, **options: object) -> dict[str, tuple[str, str]]:
    """What is chosen for a product with so many columns that chooses an expert, and for those."""
    constants = weights(router=(32, router), bias=(router,), experts=(router, 32, 256)) | {
        "one": np.array([1]),
        "last": np.array([-1]),
        "middle": np.array([1]),
    }
    face = "(float[n,32] x) => (float[n,1,256] y)"
    return chosen(plan_of(sketch(f"{face} {{ {EXPERTS} }}", constants), bits=bits, **options))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_small_product_that_chooses_an_expert_has_16_bits(bits):
    plan = experts(bits=bits)

    assert plan["r"] == (Compute.FLOAT, Storage.FLOAT16)
    assert plan["e"][1] is Storage.of_bits(bits)


def test_a_product_that_chooses_has_the_bits_that_were_named():
    assert experts(layer_bits={"r": 8})["r"][1] is Storage.INT8


@pytest.mark.parametrize(("columns", "storage"), [(64, Storage.FLOAT16), (2048, Storage.INT8)])
def test_a_large_product_that_chooses_is_rounded_as_others_are(columns, storage):
    arrays = weights(w=(16, columns), v=(16, 8192))
    text = "y = MatMul(x, w) z = ArgMax<axis = 1, keepdims = 0>(y) u = MatMul(x, v)"

    plan = plan_of(sketch(f"(float[n,16] x) => (int64[n] z, float[n,8192] u) {{ {text} }}", arrays))

    assert chosen(plan)["y"][1] is storage


@pytest.mark.parametrize(
    ("compute", "options", "in_16_bits"),
    [
        ({}, {}, []),
        ({"a": "float", "b": "float", "c": "float"}, {}, ["a", "b"]),
        ({"c": "float"}, {}, []),
        ({"a": "float"}, {"layer_bits": {"a": 8}}, []),
        ({"a": "float"}, {"bits": 4}, []),
    ],
    ids=["in integers", "in float", "too many", "bits by name", "others in 4 bits"],
)
def test_the_fewest_weights_that_compute_in_float_have_16_bits(compute, options, in_16_bits):
    arrays = weights(d=(32, 1, 1, 1), e=(32, 1, 1, 1), u=(64, 32, 1, 1), v=(8, 64, 1, 1))
    text = "a = Conv <group=32> (x, d) b = Conv <group=32> (a, e) c = Conv(b, u) y = Conv(c, v)"
    model = sketch(f"(float[n,32,1,1] x) => (float[n,8,1,1] y) {{ {text} }}", arrays)

    plan = plan_of(model, compute, min_elements=0, **options)

    assert [n.node for n in plan.nodes if n.storage is Storage.FLOAT16] == in_16_bits
