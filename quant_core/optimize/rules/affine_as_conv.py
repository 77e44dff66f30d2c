"""Affine operators between Convs in the form that onnxruntime computes in its blocked layout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.chains import Chain, chains
from quant_core.optimize.edit import constant, put_in_place
from quant_core.optimize.facts import Facts

BLOCKED = frozenset(
    {"Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Relu", "Sigmoid",
     "Tanh", "HardSigmoid", "LeakyRelu", "Clip", "Mul", "Add", "Concat"}
)  # fmt: skip


def affine_as_conv(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """Affine operators that no neighbour takes in, as a depthwise 1 x 1 Conv.

        Conv -> Mul(s) -> Add(t) -> Conv   =>   Conv -> Conv(w = s, b = t, group = C) -> Conv

    1. The tensor has four axes, and its channels are known and vary at most along axis 1.
    2. What is around may be in the blocked layout, which onnxruntime leaves for a Mul or Add by a
       constant.
    3. A BatchNormalization alone stays: it is computed in that layout already.
    """
    applied = []
    for chain in chains(model, facts):
        channels = facts.size(chain.source, 1)
        fits = facts.rank(chain.source) == 4 and chain.affine.axis in (None, 1)  # 1.
        if not chosen(chain.names[-1]):
            continue
        if fits and channels and channels > 1 and _is_between(chain):  # 2. 3.
            _write(chain, channels)
            applied.append(Applied("affine_as_conv", chain.names[-1], chain.names[:-1]))
    return applied


def _is_between(chain: Chain) -> bool:
    producer = chain.source.producer()
    readers = graph.consumers(chain.output)
    if [n.op_type for n in chain.nodes] == ["BatchNormalization"]:
        return False
    return (
        producer is not None
        and producer.op_type in BLOCKED
        and any(r.op_type in BLOCKED for r in readers)
    )


def _write(chain: Chain, channels: int) -> None:
    inside, last = chain.inside, chain.nodes[-1]
    scale, shift = (np.array(n) for n in chain.affine.widened(channels))
    weight = constant(inside, f"{last.name}_scale", scale.reshape(channels, 1, 1, 1))
    bias = constant(inside, f"{last.name}_shift", shift)
    attributes = [ir.AttrInt64("group", channels), ir.AttrInt64s("kernel_shape", (1, 1))]
    inputs = [chain.source, weight, bias]
    put_in_place(chain.nodes, ir.Node("", "Conv", inputs, attributes, name=last.name))
