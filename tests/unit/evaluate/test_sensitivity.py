"""The sensitivity of each node: by itself, and with all nodes before it quantized too."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.deadline import Deadline
from quant_core.evaluate.node_noise import measure_noise, measure_sensitivity
from quant_core.evaluate.sensitivity import NodeNoise, Sensitivity, sensitivities
from quant_core.model.session import sizes_of
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import one_graph

FEEDS = [
    {"x": np.random.default_rng(k).standard_normal((4, 32), dtype=np.float32)} for k in range(4)
]


def chain() -> ir.Model:
    """Three MatMuls m0, m1, m2, one after the other."""
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((32, 32), dtype=np.float32) / 6 for k in range(3)}
    tensors = ["x", "a", "b", "y"]
    nodes = [
        helper.make_node("MatMul", [tensors[k], f"w{k}"], [tensors[k + 1]], f"m{k}")
        for k in range(3)
    ]
    return ir.from_proto(one_graph(nodes, weights, input=("n", 32), output=("n", 32)))


def static(model: ir.Model, **config: object) -> ir.Model:
    """The model with static MatMuls, calibrated on FEEDS."""
    settings = QuantConfig.from_dict({"mode": "static", **config})
    plan = make_plan(model, settings, TARGETS["portable"])
    stats = observe(ir.to_proto(model).SerializeToString(), plan, FEEDS)
    return apply_plan(model, plan, stats).model


def sensitivity_of(**config: object) -> dict[str, Sensitivity]:
    model = chain()
    return {row.node: row for row in measure_sensitivity(model, static(model, **config), FEEDS)}


def test_only_quantized_nodes_have_a_sensitivity():
    assert list(sensitivity_of(exclude=["m0", "m2"])) == ["m1"]


def test_the_noise_of_earlier_nodes_is_cumulative_but_not_isolated():
    coarse, fine = sensitivity_of(layer_bits={"m0": 4}), sensitivity_of()

    assert coarse["m0"].isolated_db < fine["m0"].isolated_db - 6
    assert coarse["m2"].isolated_db == fine["m2"].isolated_db
    assert coarse["m2"].cumulative_db < fine["m2"].cumulative_db - 6
    first = fine["m0"]  # no node comes before it
    assert first.isolated_db == pytest.approx(first.cumulative_db, abs=0.1)


def test_a_model_against_itself_has_no_noise():
    model = chain()

    assert measure_sensitivity(model, model, FEEDS) == []


def test_a_tensor_that_two_nodes_dequantize_is_measured_as_it_was_computed():
    """As in a file of quantization-aware training, of which some nodes stay as they are."""
    model = chain()
    quantized = static(model)
    rounded = next(n for n in quantized.graph if n.inputs[0].name == "a")
    back = rounded.outputs[0].consumers()[0]
    other = ir.Node("", "DequantizeLinear", back.inputs, name="other", version=17)
    other.outputs[0].name = "other"
    quantized.graph.insert_after(back, other)
    quantized.graph.outputs.append(other.outputs[0])

    found = measure_sensitivity(model, quantized, FEEDS)

    assert {row.node for row in found} >= {"m0", "m2"}


def test_a_ratio_of_powers_is_given_in_decibels():
    noise = NodeNoise("m", "MatMul", signal=(60.0, 40.0), isolated=(0.1, 0.0), cumulative=(1, 9))

    assert sensitivities([[noise]]) == [Sensitivity("m", "MatMul", 30.0, 10.0)]


def test_a_node_that_gives_zeros_has_no_sensitivity():
    assert sensitivities([[NodeNoise("m", "MatMul", (0.0,), (1.0,), (1.0,))]]) == []


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shares_of_the_samples_merge_to_the_last_bit(shards):
    model = chain()
    quantized = static(model)

    parts = [measure_noise(model, quantized, FEEDS[k::shards]) for k in range(shards)]
    through_json = [
        [NodeNoise(**json.loads(json.dumps(noise.to_dict()))) for noise in part]
        for part in reversed(parts)
    ]

    merged = sensitivities(through_json)
    whole = measure_sensitivity(model, quantized, FEEDS)
    assert sorted(merged, key=repr) == sorted(whole, key=repr)


def test_where_no_time_is_left_one_sample_is_measured():
    model = chain()

    found = measure_noise(model, static(model), FEEDS, Deadline.after(0.0))

    assert {len(noise.signal) for noise in found} == {1}


def test_tensors_that_are_measured_in_parts_have_the_same_noise(monkeypatch):
    model = chain()
    quantized = static(model)
    whole = measure_noise(model, quantized, FEEDS)

    monkeypatch.setattr("quant_core.model.values.MAX_PART_BYTES", 4 * 4 * 32)  # of one

    for one, found in zip(whole, measure_noise(model, quantized, FEEDS), strict=True):
        assert (found.node, found.signal) == (one.node, one.signal)
        assert found.isolated == one.isolated
        # between two pieces a float32 is rounded where a kernel goes on with what it has
        np.testing.assert_allclose(found.cumulative, one.cumulative, rtol=1e-4)


def test_one_run_tells_the_sizes_of_tensors():
    sizes = sizes_of(chain(), ["a", "b", "y"], FEEDS[0])

    assert sizes == dict.fromkeys("aby", 4 * 32)


@pytest.mark.parametrize("suffix", ["/size", "/computed"])
def test_a_tensor_may_be_called_like_a_part_of_another(suffix):
    """Sparse constants are made by nodes with such names."""
    model = chain()
    values = {v.name: v for node in model.graph for v in node.outputs}
    values["a"].name, values["b"].name = "t", f"t{suffix}"

    assert sizes_of(model, ["t", f"t{suffix}"], FEEDS[0]) == {"t": 128, f"t{suffix}": 128}
    assert len(measure_sensitivity(model, static(model), FEEDS)) == 3
