"""Files are no larger than their originals, as long as that is what was asked for."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.api import quantize
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.optimize.run import optimize
from quant_core.plan.types import Storage
from quant_core.search.first_plan import first_plan
from quant_core.search.job import QuantJob
from quant_core.search.not_larger import FEW
from quant_core.search.pipeline import quantize_by_search
from quant_core.search.result import write_result
from tests.models import sketch

RNG = np.random.default_rng(0)


def products(folder: Path, *sizes: int) -> Path:
    """x (n, size) of products with square weights of these sizes, each with an output."""
    inputs = ", ".join(f"float[n, {size}] x{i}" for i, size in enumerate(sizes))
    outputs = ", ".join(f"float[n, {size}] y{i}" for i, size in enumerate(sizes))
    nodes = " ".join(f"y{i} = MatMul(x{i}, w{i})" for i in range(len(sizes)))
    shapes = {f"w{i}": (size, size) for i, size in enumerate(sizes)}
    weights = {name: RNG.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    onnx.save(sketch(f"({inputs}) => ({outputs}) {{ {nodes} }}", weights), folder / "m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("mode", ["auto", "weight_only"])
def test_a_model_whose_weights_are_few_stays_as_it_is(tmp_path, mode):
    path = products(tmp_path, 2, 3)

    made = quantize(path, tmp_path / "q.onnx", mode=mode)

    assert made.size_bytes <= made.float_size_bytes == path.stat().st_size
    assert "larger" not in made.note
    assert {node.reason for node in made.plan.nodes} == {FEW}


def test_only_the_smallest_weights_stay_float(tmp_path):
    made = quantize(products(tmp_path, *[2] * 8, 16), tmp_path / "q.onnx", mode="weight_only")

    assert made.size_bytes <= made.float_size_bytes
    assert [node.storage for node in made.plan.nodes][-1] is Storage.INT8
    assert Storage.FLOAT32 in {node.storage for node in made.plan.nodes}


def test_weights_that_are_stored_in_integers_compute_in_float_if_that_is_enough(tmp_path):
    made = quantize(products(tmp_path, 9, 9), tmp_path / "q.onnx")

    assert made.size_bytes <= made.float_size_bytes
    assert {node.storage for node in made.plan.nodes} == {Storage.INT8}


def test_what_was_asked_for_by_name_is_done_and_noted(tmp_path):
    by_mode = quantize(products(tmp_path, 2), tmp_path / "q.onnx", mode="dynamic")
    by_bits = quantize(products(tmp_path, 2), tmp_path / "q.onnx", layer_bits={"w*": 8})

    for made in (by_mode, by_bits):
        assert made.plan.nodes[0].storage is Storage.INT8
        assert "larger than its original" in made.note


def test_bits_that_are_asked_for_by_a_name_of_the_file_stay(tmp_path):
    text = "(float[n, 2] x) => (float[n, 2] y) { p = MatMul(x, w) y = Add(p, b) }"
    weights = {"w": RNG.standard_normal((2, 2), np.float32), "b": np.ones(2, np.float32)}
    onnx.save(sketch(text, weights), tmp_path / "m.onnx")

    made = quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", layer_bits={"y": 8})

    (planned,) = made.plan.nodes
    assert planned.node != "y"  # one Gemm of both
    assert planned.storage is Storage.INT8


@pytest.mark.parametrize("width", [8, 10, 11, 12])
def test_a_file_that_is_larger_by_what_it_says_of_itself_is_noted_too(tmp_path, width):
    made = quantize(products(tmp_path, width), tmp_path / "q.onnx", mode="dynamic")

    assert made.size_bytes == (tmp_path / "q.onnx").stat().st_size
    assert (made.size_bytes > made.float_size_bytes) == ("larger than its original" in made.note)


def test_weights_that_were_promoted_to_float16_are_no_larger_than_in_float32(tmp_path):
    made = quantize(products(tmp_path, 4, 4), tmp_path / "q.onnx", mode="weight_only", floor_db=60)

    assert made.size_bytes <= made.float_size_bytes
    assert "larger" not in made.note


def test_rewrites_that_make_the_file_larger_than_its_integers_can_save_are_left(tmp_path):
    text = """(float[1,8,16,16] x) => (float[1,4,16,16] y) {
        c = Conv<pads = [1, 1, 1, 1]>(x, w) y = Mul(c, s)
    }"""
    weights = {"w": RNG.standard_normal((4, 8, 3, 3), np.float32), "s": np.full(1, 2, np.float32)}
    onnx.save(sketch(text, weights), tmp_path / "m.onnx")
    size, config = (tmp_path / "m.onnx").stat().st_size, QuantConfig(exclude=("y",))
    feeds = [{"x": RNG.standard_normal((1, 8, 16, 16), np.float32)}]
    found = optimize(prepare(tmp_path / "m.onnx", feeds), feeds, lambda before, after: 2.0)
    plan = first_plan(found.model, config, measured=False, rewrites=found.applied)

    made = quantize_by_search(QuantJob(found.model, tmp_path / "m.onnx", size, plan))

    assert [change.rule for change in found.applied] == ["fold_into_producer", "stack_outputs"]
    assert [change.rule for change in made.best.plan.rewrites] == ["fold_into_producer"]
    assert write_result(made, tmp_path / "q.onnx").size_bytes <= size
