"""Four bits end to end: what may judge them, what cannot hold them, what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core import api, judging
from quant_core.config import Contract, QuantConfig
from quant_core.errors import ModelError
from quant_core.model import opset
from quant_core.model.session import open_session
from tests.models import sketch
from tests.oracle.cases import weights

FOUR = QuantConfig(bits=4, mode="static")
SAMPLES = np.random.default_rng(0).standard_normal((32, 32), dtype=np.float32)


def saved(folder: Path, layers: int = 3, **changed: np.ndarray) -> Path:
    arrays = weights(**{f"w{i}": (32, 32) for i in range(layers)}) | changed
    chain = " ".join(f"l{i + 1} = Gemm(l{i}, w{i})" for i in range(layers)).replace(
        f"l{layers} =", "y ="
    )
    text = f"(float[n,32] x) => (float[n,32] y) {{ {chain.replace('Gemm(l0,', 'Gemm(x,')} }}"
    onnx.save(sketch(text, arrays), folder / "float.onnx")
    return folder / "float.onnx"


@pytest.fixture
def stuck(monkeypatch):
    """The opset cannot be raised."""

    def fail(model, version):
        raise RuntimeError("no adapter for Gemm")

    monkeypatch.setattr(opset, "_converted", fail)


def test_a_contract_is_judged_by_samples_that_nothing_was_fitted_to(tmp_path, equal_times):
    contract = Contract("sqnr", min=5.0)

    alone = api.quantize_model(
        saved(tmp_path), tmp_path / "a.onnx", FOUR, calibration=SAMPLES, contract=contract
    )
    given = api.quantize_model(
        saved(tmp_path),
        tmp_path / "b.onnx",
        FOUR,
        calibration=SAMPLES,
        contract=contract,
        evaluation=-SAMPLES,
    )

    assert "judged by 8 samples held out" in alone.note
    assert "held out" not in given.note
    assert (
        Path(alone.output).read_bytes() == Path(given.output).read_bytes()
    )  # both are fitted to all samples


def test_a_verdict_is_by_all_evaluation_samples_or_says_what_stood_in_for_them(tmp_path):
    original, contract = saved(tmp_path), Contract("sqnr", min=5.0)
    many = np.random.default_rng(1).normal(size=(200, *SAMPLES.shape[1:])).astype(np.float32)

    given = api.quantize_model(
        original, tmp_path / "a.onnx", calibration=SAMPLES, contract=contract, evaluation=many
    )
    alone = api.quantize_model(original, tmp_path / "b.onnx", calibration=many, contract=contract)

    assert (
        given.reason
        == judging.validate_model(original, given.output, many, contract=contract).reason
    )
    assert "samples that ranges were measured on" in alone.note
    assert "samples that ranges were measured on" not in given.note


@pytest.mark.parametrize(("least", "wanted"), [(22.0, {"int4", "int8"}), (30.0, {"int8"})])
def test_a_hybrid_says_why_layers_are_in_8_bits_and_its_plan_makes_the_same_bytes(
    tmp_path, least, wanted
):
    made = api.quantize_model(
        saved(tmp_path, 5),
        tmp_path / "a.onnx",
        FOUR,
        calibration=SAMPLES,
        contract=Contract("sqnr", min=least),
    )
    again = api.quantize_model(
        tmp_path / "float.onnx", tmp_path / "b.onnx", plan=made.plan, calibration=SAMPLES
    )

    storages = {n.storage: n.reason for n in made.plan.nodes}
    assert made.verdict == "met"
    assert set(storages) == wanted
    assert "4 bits break the contract" in storages["int8"]
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


def test_exactly_4_bits_in_an_opset_that_cannot_be_raised_names_the_node_and_the_way_out(
    tmp_path, stuck
):
    with pytest.raises(ModelError, match="cannot be raised to 21: no adapter for Gemm") as caught:
        api.quantize_model(saved(tmp_path), tmp_path / "out.onnx", FOUR, calibration=SAMPLES)

    assert caught.value.where
    assert "8 bits" in caught.value.hint
    assert not (tmp_path / "out.onnx").exists()


def test_a_contract_in_an_opset_that_cannot_be_raised_is_kept_in_8_bits(tmp_path, stuck):
    made = api.quantize_model(
        saved(tmp_path),
        tmp_path / "out.onnx",
        FOUR,
        calibration=SAMPLES,
        contract=Contract("sqnr", min=5.0),
    )

    assert made.verdict == "met"
    assert {n.storage for n in made.plan.nodes if n.weights} == {"int8"}
    assert all("cannot be raised to 21" in row["reason"] for row in made.layers if row["weight"])


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_a_weight_of_zeros_stays_one(tmp_path, mode):
    path = saved(tmp_path, w1=np.zeros((32, 32), np.float32))

    api.quantize_model(
        path, tmp_path / "out.onnx", QuantConfig(bits=4, mode=mode), calibration=SAMPLES
    )

    (y,) = open_session(tmp_path / "out.onnx").run(None, {"x": SAMPLES})
    np.testing.assert_array_equal(y, np.zeros_like(y))


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_all_sixteen_integers_come_back_from_every_storage(tmp_path, mode):
    """The weights of a table, a product and a Conv lie on a grid of 4 bits, from -8 * 13 to 7 * 15.

    Activations in 8 bits leave more than 30 dB, another integer for -8 would leave 12 dB.
    """
    rng = np.random.default_rng(0)
    q = np.stack([rng.integers(-8, 8, (64, 32)) * 13, rng.integers(-7, 8, (64, 32)) * 15], axis=1)
    q[:, :, 0] = -8 * 13, 7 * 15
    q[:, :, 1::2] = 0  # so that every pair of neighbours is safe
    w = q.reshape(64, 64).astype(np.float32) / 1024
    text = """(int64[n] x) => (float[n,64,1] y) {
        rows = Gather(w, x)  product = MatMul(rows, m)  u = Unsqueeze(product, two)  y = Conv(u, c)
    }"""
    arrays = {"w": w, "m": w.T.copy(), "c": w[:, :, None], "two": np.array([2])}
    onnx.save(sketch(text, arrays), tmp_path / "float.onnx")
    config = QuantConfig(bits=4, mode=mode, target="x86", layer_bits={"*": 4})
    feed = {"x": np.arange(64)}

    api.quantize_model(tmp_path / "float.onnx", tmp_path / "q.onnx", config, calibration=feed["x"])

    names = ("float.onnx", "q.onnx")
    exact, found = (open_session(tmp_path / name).run(None, feed)[0] for name in names)
    assert np.square(found - exact).sum() < 1e-3 * np.square(exact).sum()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_weight_that_is_not_finite_stays_float_with_the_reason(tmp_path, value):
    broken = np.eye(32, dtype=np.float32)
    broken[3, 3] = value

    plan = api.plan_model(saved(tmp_path, w2=broken), QuantConfig(bits=4))

    (node,) = (n for n in plan.nodes if "w2" in n.weights)
    assert node.storage == "float32"
    assert "NaN or inf" in node.reason


@pytest.mark.parametrize("columns", [31, 37, 40, 97])
def test_a_block_that_does_not_divide_gives_way_to_one_that_does(tmp_path, columns):
    arrays = weights(w=(columns, 48))
    onnx.save(
        sketch(f"(float[n,{columns}] x) => (float[n,48] y) {{ y = Gemm(x, w) }}", arrays),
        tmp_path / "f.onnx",
    )
    x = np.random.default_rng(0).standard_normal((24, columns), dtype=np.float32)
    config = QuantConfig(bits=4, mode="static", layer_bits={"*": 4}, block_size=32)

    made = api.quantize_model(tmp_path / "f.onnx", tmp_path / "out.onnx", config, calibration=x)

    assert made.plan.nodes[0].storage == "int4"
    assert (
        judging.validate_model(tmp_path / "f.onnx", tmp_path / "out.onnx", x).fidelity.sqnr_db > 10
    )


@pytest.mark.parametrize("mode", ["auto", "weight_only"])
def test_a_file_with_many_small_weights_is_no_larger_in_4_bits_than_in_8(tmp_path, mode):
    heads = {f"w{i}": (64, 8) for i in range(16)}
    text = f"""(float[n,64] x) => ({", ".join(f"float[n,8] y{i}" for i in range(16))}) {{
        h = MatMul(x, trunk) {" ".join(f"y{i} = MatMul(h, w{i})" for i in range(16))} }}"""
    onnx.save(sketch(text, weights(trunk=(64, 64), **heads)), tmp_path / "float.onnx")

    four, eight = (
        api.quantize(tmp_path / "float.onnx", tmp_path / f"{bits}.onnx", bits=bits, mode=mode)
        for bits in (4, 8)
    )

    assert four.size_bytes < eight.size_bytes
    assert four.plan.in_four_bits == ["h"]
    assert "512 weights are too few for 4 bits" in four.plan.nodes[1].reason
