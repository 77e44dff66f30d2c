"""Whatever a graph is made of, its quantized form is as near as its scales, and looks the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from quant_core.api import quantize_model
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import QuantPlan
from quant_core.rewrite.apply import apply_plan
from tests.laws.bounds import output_bounds
from tests.laws.graphs import Feed, graphs

WAYS: list[dict[str, Any]] = [
    {"mode": "weight_only"},
    {"mode": "weight_only", "bits": 4},
    {"mode": "weight_only", "bits": 4, "runtime": "qdq"},
    {"mode": "dynamic"},
    {"mode": "dynamic", "bits": 4},
    {"mode": "static"},
    {"mode": "static", "bits": 4},
]
# Their scales alone bound the errors: nothing is clipped, fitted to samples or corrected.
PLAIN = {"weight_method": "rtn", "method": "minmax", "bias_correction": False}
HALF = 2e-3  # of an output in float16, whose own steps are 2**-11
SINGLE = 1e-6
Graph = tuple[onnx.ModelProto, Feed]


def any_graph(examples: int, *others: Any) -> Any:
    """Runs a test on that many graphs, the same each time."""
    bounded = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: pytest.mark.slow(bounded(given(graphs(), *others)(test)))


@any_graph(50, st.sampled_from(WAYS))
def test_outputs_are_within_the_bound_that_the_scales_imply(graph: Graph, way: dict[str, Any]):
    proto, feed = graph
    with tempfile.TemporaryDirectory() as folder:
        path, _ = saved(proto, feed, Path(folder))
        model = prepare(path, [feed])
    plan = plan_of(model, way)
    stats = observe(model, plan, [feed]) if way["mode"] == "static" else None

    got = run(open_session(apply_plan(model, plan, stats).model), feed)

    for (x, error), y in zip(output_bounds(model, plan, feed), got, strict=True):
        share = HALF if y.dtype == np.float16 else SINGLE
        allowed = error + share * (np.abs(x.astype(np.float64)) + 1)
        assert (np.abs(x.astype(np.float64) - y.astype(np.float64)) <= allowed).all()


@pytest.mark.usefixtures("equal_times")
@any_graph(20, st.sampled_from([{}, *WAYS]), st.booleans())
def test_files_look_the_same_and_are_not_larger(
    graph: Graph, way: dict[str, Any], has_samples: bool
):
    proto, feed = graph
    samples = [feed, feed] if has_samples or way.get("mode") == "static" else None
    with tempfile.TemporaryDirectory() as folder:
        path, expected = saved(proto, feed, Path(folder))

        try:
            made = quantize_model(
                path, path.with_name("q.onnx"), QuantConfig(**way), calibration=samples
            )
        except ModelError as error:
            assume("nothing to quantize" not in error.problem)
            raise

        again = path.with_name("again.onnx")
        quantize_model(path, again, plan=made.plan, calibration=samples)
        assert QuantPlan.from_json(made.plan.to_json()) == made.plan
        got = run(open_session(made.output), feed)
        assert interface_of(onnx.load(made.output)) == interface_of(proto)
        assert [x.shape for x in got] == [x.shape for x in expected]
        for mode in ("auto", "weight_only"):
            assert made.plan.config.mode != mode or made.size_bytes <= path.stat().st_size
        if made.size_bytes > made.float_size_bytes:
            assert "larger than its original" in made.note
        broken = [worst_db(a, b) < made.floor_db for a, b in zip(expected, got, strict=True)]
        assert not any(broken) or made.shortfall or "not checked" in made.note


def saved(proto: onnx.ModelProto, feed: Feed, folder: Path) -> tuple[Path, list[np.ndarray]]:
    """The file of a model and its outputs; a model that onnxruntime does not run does not count."""
    path = folder / "m.onnx"
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    try:
        return path, run(open_session(path), feed)
    except ModelError:
        assume(False)  # no CPU kernel for that type
        raise


def plan_of(model: Any, way: dict[str, Any]) -> QuantPlan:
    try:
        return make_plan(model, QuantConfig(**way, **PLAIN), TARGETS["x86"])
    except ModelError as error:
        assume("nothing to quantize" not in error.problem)
        raise


def interface_of(proto: onnx.ModelProto) -> Any:
    """What others see of a model."""
    properties = [(p.key, p.value) for p in proto.metadata_props if "quantmill" not in p.key]
    faces = [(v.name, str(v.type)) for v in (*proto.graph.input, *proto.graph.output)]
    return faces, properties, proto.doc_string, proto.graph.doc_string, proto.graph.name


def worst_db(expected: np.ndarray, got: np.ndarray) -> float:
    """Signal over noise in dB, infinite where there is none; -inf where only float is finite."""
    if expected.dtype.kind != "f":
        return np.inf
    x, y = expected.astype(np.float64), got.astype(np.float64)
    known = np.isfinite(x)
    noise, signal = np.square(x - y)[known].sum(), np.square(x[known]).sum()
    if not np.isfinite(noise):
        return -np.inf
    return np.inf if noise <= 1e-12 * x.size else float(10 * np.log10(max(signal, 1e-300) / noise))
