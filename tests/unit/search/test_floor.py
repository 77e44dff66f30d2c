"""No finished file is silently wrong: what is below the floor is repaired, or reported."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec
from quant_core.metrics import OutputFidelity
from quant_core.model.session import open_session, run
from tests.models import sketch
from tests.oracle.cases import weights


def filter_bank() -> onnx.ModelProto:
    """A product with a wide range in front of a logarithm, as in an audio front end."""
    bank = np.abs(weights(w=(64, 32))["w"])
    text = "(float[1,n,64] x) => (float[1,n,32] y) { p = Mul(x, x) q = Mul(p, p) r = Mul(q, q)"
    return sketch(text + " m = MatMul(r, w) y = Log(m) }", {"w": bank})


def noisy() -> onnx.ModelProto:
    text = "(float[n,32] x) => (float[n,16] y, float[n,16] z)"
    text += " { y = MatMul(x, w) s = Sigmoid(y) r = Bernoulli(s) z = Add(y, r) }"
    return sketch(text, weights(w=(32, 16)))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_in_front_of_a_logarithm_is_repaired_without_any_data(tmp_path, bits):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(filter_bank(), model)

    result = quantize_model(model, output, QuantConfig(bits=bits))

    assert result.verdict == "none"
    assert not result.shortfall
    assert result.worst_db >= result.floor_db == {8: 12.0, 4: 8.0}[bits]
    x = np.random.default_rng(3).standard_normal((1, 20, 64)).astype(np.float32)
    want, got = (run(open_session(path), {"x": x})[0] for path in (model, output))
    noise = float(np.square(want - got).sum() / np.square(want).sum())
    assert -10 * np.log10(noise) >= result.floor_db


def test_a_difference_that_16_bits_blur_goes_back_to_float32(tmp_path):
    text = "(float[n,32] x) => (float[n,16] y) { a = MatMul(x, u) b = MatMul(x, v) y = Sub(a, b) }"
    arrays = weights(u=(32, 16), v=(32, 16))
    arrays["v"] = arrays["u"] + 1e-4 * arrays["v"]
    onnx.save(sketch(text, arrays), tmp_path / "m.onnx")

    result = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx")

    assert not result.shortfall
    assert result.worst_db >= result.floor_db


def test_a_plan_that_is_followed_exactly_is_only_reported(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(filter_bank(), model)
    config = QuantConfig(mode="dynamic", floor_db=0.0)
    made = quantize_model(model, output, config)
    plan = made.plan.to_dict()
    plan["config"]["floor_db"] = 100.0

    result = quantize_model(model, output, plan=type(made.plan).from_json(json.dumps(plan)))

    assert output.exists()
    assert result.verdict == "not_met"
    assert "output y" in result.reason
    assert "at least 100" in result.reason
    assert "node" in result.reason


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_outputs_that_are_the_same_on_all_samples_prove_little(tmp_path, gain):
    text = "(float[n,32] x) => (float[n,16] y) { m = MatMul(x, w) g = Mul(m, gain) y = Add(g, b) }"
    arrays = {**weights(w=(32, 16), b=(16,)), "gain": np.float32([gain])}
    onnx.save(sketch(text, arrays), tmp_path / "m.onnx")

    result = quantize_model(
        tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(mode="dynamic", optimize=False)
    )

    assert ("outputs are the same on all" in result.note) == (gain == 0)


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_outputs_that_no_rounded_weight_reaches_prove_little(tmp_path, far):
    text = """(float[n,32] x) => (float[n,32] y)
        { m = MatMul(x, w) s = Sub(m, far) r = Relu(s) y = Add(x, r) }"""
    arrays = {**weights(w=(32, 32)), "far": np.float32([far])}
    onnx.save(sketch(text, arrays), tmp_path / "m.onnx")

    result = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(mode="dynamic"))

    assert ("rounded weights change no output" in result.note) == (far > 0)


def test_outputs_that_float_does_not_repeat_are_not_judged(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(noisy(), model)

    result = quantize_model(model, output)

    assert "optimizers, float gives other values at z" in result.note
    assert result.worst_db > 20
    assert result.verdict == "none"
    assert all(layer["storage"] == "int8" for layer in result.layers)


def test_a_model_that_nothing_can_be_drawn_for_is_delivered_with_a_note(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = "(float[1,7] x, float[1,n] z) => (float[1,8] y)"
    text += " { a = Concat<axis = 1>(x, z) b = Reshape(a, s) y = MatMul(b, w) }"
    arrays = weights(w=(1_000_003, 1)) | {"s": np.array([1, 1_000_003], np.int64)}
    onnx.save(sketch(text.replace("[1,8]", "[1,1]"), arrays), model)

    result = quantize_model(model, output)

    assert output.exists()
    assert "not checked" in result.note
    assert "not run: no random sample fits" in result.note
    assert result.worst_db is None
    assert result.verdict == "none"


def test_a_model_that_takes_any_text_is_delivered_with_a_note_that_says_so(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = "(string[n,32] words) => (float[n,16] y)"
    text += (
        ' { s = RegexFullMatch<pattern = "[a-z]+">(words) x = Cast<to = 1>(s) y = MatMul(x, w) }'
    )
    onnx.save(sketch(text, weights(w=(32, 16)), opset=20), model)

    result = quantize_model(model, output)

    assert "words: takes text" in result.note


def test_probabilities_with_a_small_error_are_sound_whatever_their_sqnr():
    tails = OutputFidelity("p", 0.1, -3.0, 0.019, 1.0, float_range=(0.0, 1.0), centred_db=-3.0)
    large = replace(tails, max_abs_error=0.021)
    other = replace(tails, float_range=(0.0, 1.1))

    assert tails.sound_db == 200
    assert large.sound_db == other.sound_db == -3.0


@pytest.mark.parametrize(("low", "noted"), [(-80, True), (-30, False)])
def test_probabilities_that_are_small_on_all_samples_are_noted(tmp_path, low, noted):
    text = "(float[n,64] x) => (float[n,64] y) { h = MatMul(x, w) t = Add(h, low) y = Exp(t) }"
    w = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    onnx.save(sketch(text, {"w": w, "low": np.float32(low)}), tmp_path / "m.onnx")
    config = QuantConfig(bits=4, mode="weight_only")

    result = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", config)

    assert ("on all samples that judge" in result.note) == noted
    assert result.verdict == "none"


@pytest.mark.parametrize(("scale", "noted"), [(0.03, True), (1.0, False)])
def test_an_output_of_which_noise_covers_what_differs_between_samples_is_noted(
    tmp_path, scale, noted
):
    text = """(float[n,64] x) => (float[n,64] y)
        { c = Mul(x, scale) d = Mul(c, scale) e = Exp(d) y = MatMul(e, w) }"""
    w = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    values = {"w": w, "scale": np.float32(scale)}
    onnx.save(sketch(text, values), tmp_path / "m.onnx")
    config = QuantConfig(mode="weight_only")

    result = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", config)

    assert ("of what differs between samples" in result.note) == noted


def test_an_output_that_is_never_finite_is_noted(tmp_path):
    text = """(float[n,64] x) => (float[n,64] y)
        { h = MatMul(x, w) a = Abs(h) b = Add(a, one) c = Neg(b) y = Sqrt(c) }"""
    w = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)
    onnx.save(sketch(text, {"w": w, "one": np.float32(1)}), tmp_path / "m.onnx")

    result = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx")

    assert "no finite number on all samples that judge" in result.note


def test_the_floor_is_a_contract_of_the_config():
    assert QuantConfig().floor == Contract("worst_sqnr", min=12.0)
    assert QuantConfig(bits=4).floor == Contract("worst_sqnr", min=8.0)
    assert QuantConfig(floor_db=25).floor == Contract("worst_sqnr", min=25.0)


def test_a_search_without_time_ends_with_the_best_it_has(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(filter_bank(), model)

    result = quantize_model(
        model, output, QuantConfig(time_budget_s=1e-6), calibration=SampleSpec(count=8)
    )

    assert output.exists()
    assert not result.shortfall
    assert len([row for row in result.trace if "float" not in row["candidate"]]) == 1
    assert "the search ended with the best plan that it had" in result.note


def test_rows_of_nan_that_the_model_masks_are_no_reason_to_refuse_it(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = "(float[n,32] x, float[n,1] k) => (float[n,8] y) { d = Div(x, k) a = MatMul(d, u)"
    text += " e = IsNaN(a) b = Where(e, z, a) t = Tanh(b) y = MatMul(t, w) }"
    arrays = weights(u=(32, 16), w=(16, 8)) | {"z": np.zeros((), np.float32)}
    onnx.save(sketch(text, arrays), model)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((24, 6, 32)).astype(np.float32)
    k = np.ones((24, 6, 1), np.float32)
    x[:, 4:], k[:, 4:] = 0, 0

    result = quantize_model(model, output, calibration={"x": x, "k": k})

    assert result.worst_db >= 12
    assert not result.shortfall


def test_activations_that_float32_cannot_square_give_no_warning(tmp_path, recwarn):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = "(float[n,16] x) => (float[n,8] y) { a = MatMul(x, u) b = Mul(a, big) y = MatMul(b, w) }"
    arrays = weights(u=(16, 32), w=(32, 8)) | {"big": np.array(1e20, np.float32)}
    onnx.save(sketch(text, arrays), model)

    result = quantize_model(model, output, calibration=SampleSpec(count=8))

    assert result.worst_db >= 12
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def save_with_a_small_channel(path):
    """Its output is far below the others, so that no output as a whole tells."""
    w = weights(w=(32, 16))["w"]
    w[:, 3] *= 1e-4
    text = "(float[n,32] x) => (float[n,16] y) { y = MatMul(x, w) }"
    onnx.save(sketch(text, {"w": w}), path)


def test_a_channel_that_one_scale_for_all_spoils_gets_a_scale_of_its_own(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    save_with_a_small_channel(model)

    result = quantize_model(model, output, QuantConfig(per_channel=False))

    x = np.random.default_rng(3).standard_normal((20, 32)).astype(np.float32)
    want, got = (run(open_session(path), {"x": x})[0][:, 3] for path in (model, output))
    assert np.square(want - got).sum() < 10**-2.5 * np.square(want).sum()
    assert not result.shortfall


def test_a_broken_channel_that_may_not_be_repaired_is_reported_with_its_node(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    save_with_a_small_channel(model)
    made = quantize_model(model, output, QuantConfig(mode="dynamic", floor_db=0.0))
    plan = made.plan.to_dict()
    plan["config"] |= {"floor_db": 12.0, "per_channel": False}
    plan["nodes"][0]["granularity"] = "tensor"

    result = quantize_model(model, output, plan=type(made.plan).from_json(json.dumps(plan)))

    assert result.verdict == "not_met"
    assert made.plan.nodes[0].node in result.reason
    assert "a channel of the weight" in result.reason


def test_dead_channels_and_those_that_a_bias_hides_are_not_broken(tmp_path):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    arrays = weights(w=(8, 4, 3, 3), b=(8,))
    arrays["w"][0] = 0
    arrays["w"][1] *= 1e-12
    arrays["b"][1] = 5
    text = "(float[1,4,8,8] x) => (float[1,8,6,6] y) { y = Conv(x, w, b) }"
    onnx.save(sketch(text, arrays), model)

    result = quantize_model(
        model, output, QuantConfig(mode="static"), calibration=SampleSpec(count=4)
    )

    assert not result.shortfall
    assert [node.compute for node in result.plan.nodes] == ["static"]


@pytest.mark.parametrize(
    ("end", "axis"),
    [
        ("y = Identity(c)", 1),
        ("y = Transpose<perm = [0, 2, 3, 1]>(c)", -1),
        ("f = Reshape(c, rows) y = Unsqueeze(f, first)", 1),
        ("y = GlobalAveragePool(c)", 1),
        ("d = Conv(r, w) y = Add(c, d)", 1),
        ('d = Concat<axis = 1>(c, r) y = Resize<mode = "nearest">(d, , scales)', 1),
    ],
)
def test_channels_of_an_output_with_unlike_units_are_not_lost(tmp_path, end, axis):
    """Integers with one scale hold the largest alone: 50 dB of the whole, nothing of the others."""
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    arrays = weights(u=(16, 4, 3, 3), v=(16,), w=(3, 16, 1, 1))
    arrays["w"] *= np.array([0.01, 10, 1000], np.float32).reshape(3, 1, 1, 1)
    arrays["b"] = np.array([0, 280, 50_000], np.float32)
    shapes = {"rows": np.array([3, -1]), "first": np.array([0])}
    arrays |= shapes | {"scales": np.array([1, 1, 2, 2], np.float32)}
    size = ", ".join("defg"[: 3 if "Unsqueeze" in end else 4])
    text = f"(float[1,4,16,16] x) => (float[{size}] y) {{"
    onnx.save(
        sketch(f"{text} a = Conv(x, u, v) r = Relu(a) c = Conv(r, w, b) {end} }}", arrays), model
    )

    result = quantize_model(
        model, output, QuantConfig(mode="static"), calibration=SampleSpec(count=16)
    )

    rng = np.random.default_rng(3)
    feeds = [{"x": rng.standard_normal((1, 4, 16, 16)).astype(np.float32)} for _ in range(8)]
    want, got = (
        np.concatenate(
            [np.moveaxis(run(session, feed)[0], axis, 0)[:3].reshape(3, -1) for feed in feeds], 1
        )
        for session in (open_session(model), open_session(output))
    )
    noise = np.square(got - want).mean(axis=1)
    assert (noise < 10**-1.2 * want.var(axis=1)).all()
    assert "output y lost a channel in integers" in result.note


def test_eight_bits_aim_above_what_is_worth_a_note_unless_a_floor_is_set(tmp_path, equal_times):
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    arrays = weights(u=(64, 32), w=(64, 32))
    arrays["v"] = 0.05 * arrays.pop("w") - arrays["u"]  # most of the two products cancels
    text = "(float[n,64] x) => (float[n,32] y) { a = MatMul(x, u) b = MatMul(x, v) y = Add(a, b) }"
    onnx.save(sketch(text, arrays), model)
    config = QuantConfig(mode="dynamic", optimize=False)

    aimed = quantize_model(model, output, config)
    floor = quantize_model(model, output, replace(config, floor_db=0.0))

    assert 12 < floor.worst_db < 20 <= aimed.worst_db


def test_samples_with_another_number_of_results_do_not_hide_the_others(tmp_path):
    """NonZero picks the values above a limit, of which one model finds more than the other."""
    model, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    text = "(float[1,16] x) => (float[k,m] y, float[1,256] z) { z = MatMul(x, w) c = Clip(z, limit)"
    text += " s = Sub(c, limit) at = NonZero(s) y = Cast<to = 1>(at) }"
    onnx.save(sketch(text, weights(w=(16, 256)) | {"limit": np.array(0.3, np.float32)}), model)

    result = quantize_model(
        model, output, QuantConfig(mode="dynamic"), calibration=SampleSpec(count=64)
    )

    assert result.worst_db is not None
    assert "the number of results differs for" in result.note
