"""Weights in 4 bits take their bytes where the output's noise is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from quant_core.api import quantize_model
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.model.session import open_session
from quant_core.numerics.granularity import PerBlock
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.search.bit_allocation import allocate_bits, cheapest_choices, isolated_noise
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.result import QuantResult
from tests.models import normalized, sketch
from tests.oracle.cases import weights

# The second branch adds a thousandth to the output: its noise does not count.
BRANCHES = """(float[n,64] x) => (float[n,64] y) {
    a = MatMul(x, loud) r = Relu(a) b = MatMul(x, quiet) s = Mul(b, small) y = Add(r, s)
}"""


def branches() -> onnx.ModelProto:
    values = weights(loud=(64, 64), quiet=(64, 64))
    return sketch(BRANCHES, values | {"small": np.float32(1e-3)})


def in_blocks(name: str, elements: int = 4096) -> NodePlan:
    return NodePlan(
        name,
        "MatMul",
        Compute.STATIC,
        Storage.INT4,
        weights=(f"{name}_w",),
        elements=elements,
        granularity=PerBlock(32),
    )


def problem(**options: object) -> tuple[CalibratedModel, QuantPlan]:
    """The branches with samples, and their uniform plan."""
    source = branches().SerializeToString()
    model = normalized(branches())
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only", **options), TARGETS["x86"])
    x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    samples = open_samples(SampleSpec({"x": x}), input_specs(source))
    return CalibratedModel(model, samples, observe(source, plan, samples)), plan


def in_four_bits(source: onnx.ModelProto, folder: Path) -> QuantResult:
    onnx.save(source, folder / "m.onnx")
    samples = SampleSpec(count=4)
    return quantize_model(
        folder / "m.onnx", folder / "q.onnx", QuantConfig(bits=4), calibration=samples
    )


def noise(calibrated: CalibratedModel, plan: QuantPlan) -> float:
    made = calibrated.build(plan, "").model
    sessions = open_session(calibrated.model), open_session(made)
    pairs = [[s.run(None, feed)[0] for s in sessions] for feed in calibrated.samples]
    return sum(float(np.square(y - z).sum()) for y, z in pairs)


def test_noise_gets_the_bytes_of_blocks_that_make_none():
    quiet = {f"quiet {i}": 1e-6 for i in range(6)}
    nodes = [in_blocks(name) for name in ("loud", *quiet)]
    uniform = sum(n.elements * (0.5 + 0.5 / 32) for n in nodes)

    found = cheapest_choices(nodes, {"loud": 1.0} | quiet, uniform)

    assert found["loud"].granularity == PerBlock(8)
    assert {found[name].granularity for name in quiet} == {PerBlock(64)}


def test_a_small_weight_with_much_noise_is_in_8_bits():
    nodes = [in_blocks("large", 1 << 20), in_blocks("small", 1 << 10)]
    uniform = sum(n.elements * (0.5 + 0.5 / 32) for n in nodes)

    found = cheapest_choices(nodes, {"large": 1e-3, "small": 1e-2}, 1.01 * uniform)

    assert found["small"].storage is Storage.INT8


def test_an_allocated_plan_is_nearer_to_float_at_hardly_more_bytes():
    calibrated, uniform = problem()

    plan = allocate_bits(calibrated, uniform, NO_DEADLINE)

    assert [n.granularity.size for n in uniform.nodes if n.weights] == [32, 32]
    assert plan.nodes[0].granularity.size == 16
    assert noise(calibrated, plan) < 0.9 * noise(calibrated, uniform)
    sizes = [calibrated.build(p, "").size_bytes for p in (uniform, plan)]
    assert sizes[1] < 1.05 * sizes[0]


def test_bits_that_the_config_names_stay():
    calibrated, uniform = problem(layer_bits={"loud": 4})

    plan = allocate_bits(calibrated, uniform, NO_DEADLINE)

    assert plan.nodes[0] == uniform.nodes[0]


def test_a_plan_stays_where_there_is_no_time_to_measure():
    calibrated, uniform = problem()

    assert allocate_bits(calibrated, uniform, Deadline.after(0)) is uniform


def test_a_bias_that_broadcasts_is_corrected_as_one_number_per_channel() -> None:
    values = weights(w=(64, 24)) | {"c": np.full((1, 1), 0.5, np.float32)}
    source = sketch("(float[n,64] x) => (float[n,24] y) { y = Gemm(x, w, c) }", values)
    model = normalized(source)
    plan = make_plan(model, QuantConfig(bits=4, mode="static"), TARGETS["x86"])
    x = 1 + np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    samples = open_samples(SampleSpec({"x": x}), input_specs(source.SerializeToString()))
    stats = observe(source.SerializeToString(), plan, samples)
    found = isolated_noise(model, plan, list(plan.nodes), stats, samples, NO_DEADLINE)
    assert found is not None
    assert all(0 < noise < 0.1 * len(samples) for noise in found.values())


def test_weights_of_transposed_convs_in_groups_are_measured(tmp_path) -> None:
    text = """(float[n,8,4,4] x) => (float[n,c,h,w] y) {
        a = ConvTranspose<group = 2>(x, u) y = Conv(a, v)
    }"""

    made = in_four_bits(sketch(text, weights(u=(8, 8, 3, 3), v=(16, 16, 3, 3))), tmp_path)

    assert made.worst_db is not None


def test_weights_of_operators_that_demand_a_shape_are_measured(tmp_path) -> None:
    text = """(int32[n,8] ids) => (float[n,8,64] y) {
        e, mask = com.microsoft.EmbedLayerNormalization(ids, ids, words, places, kinds, one, zero)
        a = MatMul(e, w) y = MatMul(a, v)
    }"""
    values = weights(words=(32, 64), places=(8, 64), kinds=(32, 64), w=(64, 64), v=(64, 64))
    ends = {"one": np.ones(64, np.float32), "zero": np.zeros(64, np.float32)}

    made = in_four_bits(sketch(text, values | ends), tmp_path)

    assert made.worst_db is not None


def test_recurrent_nodes_keep_their_bits_also_where_one_of_their_weights_is_computed() -> None:
    text = """(float[t,2,32] x, float[1] gain) => (float[t,1,2,32] y) {
        w = Mul(base, gain) y = LSTM<hidden_size = 32>(x, w, r)
    }"""
    source = sketch(text, weights(base=(1, 128, 32), r=(1, 128, 32)))
    model = normalized(source)
    plan = make_plan(model, QuantConfig(bits=4, mode="weight_only"), TARGETS["x86"])
    x = np.random.default_rng(0).standard_normal((8, 4, 2, 32)).astype(np.float32)
    feeds = [{"x": each, "gain": np.ones(1, np.float32)} for each in x]
    samples = open_samples(SampleSpec(feeds), input_specs(source.SerializeToString()))
    stats = observe(source.SerializeToString(), plan, samples)
    assert [n.weights for n in plan.nodes if n.storage is Storage.INT4] == [("r",)]
    assert allocate_bits(CalibratedModel(model, samples, stats), plan, NO_DEADLINE) == plan
