"""A weight that is a part of another is stored with that alone, and computes what it did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.session import open_session, run, write_optimized
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite import apply
from tests.models import normalized, random_feed, sketch
from tests.oracle.cases import weights

COLUMNS = "y = MatMul(x, m) t = Tanh(x) z = MatMul(t, a)"
ROWS = "y = Gemm<transB = 1>(x, m) t = Tanh(x) z = Gemm<transB = 1>(t, a)"
TURNED = "y = MatMul(x, m) t = Tanh(x) z = Gemm<transB = 1>(t, a)"
ALONG_K = "u = Concat<axis = 1>(x, x, x) y = MatMul(u, m) t = Tanh(x) z = MatMul(t, a)"
LOOKED_UP = "y = MatMul(x, m) i = ArgMax(x) z = Gather(a, i)"


def model_of(body: str) -> onnx.ModelProto:
    """m holds a: as columns, as rows, or their transpose."""
    m = weights(m=(64, 192))["m"]
    held = m[:, 32:96]
    arrays = {
        COLUMNS: {"m": m, "a": held},
        ROWS: {"m": m.T, "a": held.T},
        TURNED: {"m": m, "a": held.T},
        ALONG_K: {"m": m.T, "a": held.T},
        LOOKED_UP: {"m": m, "a": held.T},
    }[body]
    columns = 64 if body == ALONG_K else 192
    interface = f"(float[n,64] x) => (float[n,{columns}] y, z)"
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return sketch(f"{interface} {{ {body} }}", arrays)


def quantized(proto: onnx.ModelProto, **options: object) -> onnx.ModelProto:
    model, feeds = normalized(proto), [random_feed(proto, seed) for seed in range(4)]
    plan = make_plan(model, QuantConfig.from_dict(options), TARGETS["x86"])
    return ir.to_proto(apply.apply_plan(model, plan, observe(model, plan, feeds)).model)


def kernels(proto: onnx.ModelProto, folder: Path) -> Counter[str]:
    """The operators that onnxruntime runs."""
    path = write_optimized(proto.SerializeToString(), folder)
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("runtime", ["folded", "qdq"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("body", [COLUMNS, ROWS, TURNED])
def test_what_a_weight_holds_of_another_is_stored_once(
    body, mode, bits, runtime, monkeypatch, tmp_path
):
    proto, options = model_of(body), {"mode": mode, "bits": bits, "runtime": runtime}
    feed = random_feed(proto, 9)

    once = quantized(proto, **options)
    monkeypatch.setattr(apply, "cut_parts", lambda *_: None)
    twice = quantized(proto, **options)

    is_cut = (mode, bits, runtime) != ("weight_only", 4, "qdq")  # int4 behind DequantizeLinear
    assert (twice.ByteSize() - once.ByteSize() > 0.75 * 64 * 64 * bits / 8) == is_cut
    assert kernels(once, tmp_path) == kernels(twice, tmp_path)
    found, expected = (run(open_session(m.SerializeToString()), feed) for m in (once, twice))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("body", [ALONG_K, LOOKED_UP])
def test_what_has_other_scales_in_its_part_is_stored_as_it_was(body, bits):
    """Columns have other scales in a longer matrix, and so may the rows of a table."""
    proto = model_of(body)
    feed = random_feed(proto, 9)

    made = quantized(proto, bits=bits)

    exact, found = (run(open_session(m.SerializeToString()), feed) for m in (proto, made))
    pairs = zip(exact, found, strict=True)
    noise = [np.square(a - b).sum() / np.square(a).sum() for a, b in pairs]
    assert max(noise) < (1e-3 if bits == 8 else 0.05)
