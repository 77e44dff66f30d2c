"""Small models of which a part is spoiled by integers, and what a search is called with."""

from __future__ import annotations

import numpy as np
import onnx

from quant_core.calibrate.observe import observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS, Runtime
from quant_core.search.bench import Bench, Reference
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.search import search
from tests.models import normalized, sketch
from tests.oracle.cases import weights


def harmful(first: str = "a") -> onnx.ModelProto:
    """Three layers; in one weight a channel that nothing reads makes the scale too coarse."""
    arrays = weights(u=(32, 32), v=(32, 32), w=(32, 8))
    name, reader = {"a": ("u", "v"), "b": ("v", "w")}[first]
    arrays[name][:, 0] *= 3000
    arrays[reader][0] = 0
    text = "a = Gemm(x, u) r = Relu(a) b = Gemm(r, v) s = Relu(b) y = Gemm(s, w)"
    return sketch(f"(float[n,32] x) => (float[n,8] y) {{ {text} }}", arrays)


def deep(layers: int) -> onnx.ModelProto:
    """That many layers, every one a little wrong in 4 bits."""
    arrays = weights(**{f"w{i}": (32, 32) for i in range(layers)})
    chain = " ".join(f"l{i + 1} = MatMul(l{i}, w{i})" for i in range(layers)).replace(
        f"l{layers} =", "y ="
    )
    return sketch(
        f"(float[n,32] x) => (float[n,32] y) {{ {chain.replace('MatMul(l0,', 'MatMul(x,')} }}",
        arrays,
    )


def loud() -> onnx.ModelProto:
    """Three convolutions; one input channel, which nothing reads, is too large for 8 bits."""
    arrays = weights(l=(1, 32, 1, 1), u=(32, 32, 1, 1), v=(32, 32, 1, 1), w=(8, 32, 1, 1))
    arrays["l"] = np.where(np.arange(32) == 0, 3000, 1).astype(np.float32).reshape(1, 32, 1, 1)
    arrays["u"][:, 0] = 0
    text = "{ m = Mul(x, l) a = Conv(m, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
    return sketch(f"(float[n,32,1,1] x) => (float[n,8,1,1] y) {text}", arrays)


def convs() -> onnx.ModelProto:
    """Three convolutions that 8 bits hardly harm."""
    arrays = weights(u=(32, 32, 1, 1), v=(32, 32, 1, 1), w=(32, 32, 1, 1))
    text = "{ a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Relu(b) y = Conv(s, w) }"
    return sketch(f"(float[n,32,1,1] x) => (float[n,32,1,1] y) {text}", arrays)


class Problem:
    """A calibrated model, its plan, and a bench to judge by.

    timed_in  the runtime; None: speed is estimated by the share of integers
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        *,
        timed_in: Runtime | None = Runtime.ONNXRUNTIME,
        metric: str | None = None,
        **options: object,
    ) -> None:
        source = proto.SerializeToString()
        self.model = normalized(proto)
        self.plan = make_plan(self.model, QuantConfig.from_dict(options), TARGETS["x86"])
        specs = input_specs(source)
        x = np.random.default_rng(0).standard_normal((64, *specs[0].shape[1:]), dtype=np.float32)
        samples = open_samples(SampleSpec({"x": x}), specs)
        self.samples = samples
        self.calibrated = CalibratedModel(self.model, stats=observe(source, self.plan, samples))
        reference = Reference.run(source, samples)
        self.bench = Bench(reference, len(source), metric, seconds=0.005, timed_in=timed_in)

    def search(self, contract: Contract | None = None):
        return search(self.calibrated, self.plan, self.bench, contract)


def in_float(candidate) -> set[str]:
    return {n.node for n in candidate.plan.nodes if n.weights and not n.is_rounded}


HARD = {"mode": "weight_only", "per_channel": False, "bias_correction": False}
