"""Every walk over a graph takes steps that grow as the graph does: counted, not timed."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.calibrate.scale_groups import scale_groups
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.random_feeds import random_source
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.judging import validate_model
from quant_core.model.normalize import load_normalized
from quant_core.model.prepare import prepare
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import sketch

WIDTH = 8
BLOCKS = (20, 100)


def residual_attention(blocks: int) -> onnx.ModelProto:
    """`blocks` blocks of x + attention(x), whose paths from end to start are exponentially many."""
    rng = np.random.default_rng(0)
    weights = {"scale": np.array(0.3, np.float32)}
    lines = []
    for i in range(blocks):
        for kind in "qkvo":
            weights[f"{kind}{i}"] = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH
        lines.append(f"""
            a{i} = MatMul(x{i}, q{i}) b{i} = MatMul(x{i}, k{i}) c{i} = MatMul(x{i}, v{i})
            t{i} = Transpose<perm = [0, 2, 1]>(b{i}) d{i} = MatMul(a{i}, t{i})
            e{i} = Mul(d{i}, scale) p{i} = Softmax(e{i}) f{i} = MatMul(p{i}, c{i})
            g{i} = MatMul(f{i}, o{i}) x{i + 1} = Add(x{i}, g{i})""")
    face = f"(float[n, 4, {WIDTH}] x0) => (float[n, 4, {WIDTH}] x{blocks})"
    return sketch(f"{face} {{ {' '.join(lines)} }}", weights)


def steps(call: Callable[[], Any]) -> int:
    """How many functions of quant_core the call enters."""
    profile = cProfile.Profile(builtins=False)
    profile.runcall(call)
    counts = {entry.code: entry.callcount for entry in profile.getstats()}
    return sum(n for code, n in counts.items() if "quant_core" in code.co_filename)


def walks(folder: Path, blocks: int) -> dict[str, Callable[[], Any]]:
    """Each walk, on a graph of that many blocks."""
    path = folder / f"{blocks}.onnx"
    onnx.save(residual_attention(blocks), path)
    model = prepare(path)
    x = np.random.default_rng(1).normal(size=(2, 4, WIDTH)).astype(np.float32)
    config, target = QuantConfig(mode="dynamic"), TARGETS["x86"]
    plan = make_plan(model, config, target)
    quantized = folder / f"{blocks}_q.onnx"
    in_integers = make_plan(model, QuantConfig(mode="static"), target)  # a search may find another
    quantize_model(path, quantized, plan=in_integers, calibration={"x0": x})
    specs = tuple(input_specs(path))
    return {
        "prepare": lambda: prepare(path),
        "plan": lambda: make_plan(model, config, target),
        "rewrite": lambda: apply_plan(model, plan, None),
        "equalize": lambda: list(scale_groups(model)),
        "saturation": lambda: saturating_nodes(load_normalized(quantized)),
        "random samples": lambda: random_source(specs, 1, 0, path),
        "validate": lambda: validate_model(path, quantized, {"x0": x}, detailed=True),
    }


@pytest.mark.slow
def test_steps_grow_as_the_graph_does(tmp_path):
    few, many = BLOCKS
    counts = {
        blocks: {n: steps(w) for n, w in walks(tmp_path, blocks).items()} for blocks in BLOCKS
    }

    growth = {name: counts[many][name] / counts[few][name] for name in counts[few]}
    assert max(growth.values()) <= many / few, growth
