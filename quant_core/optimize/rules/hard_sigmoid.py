"""Slopes between two bounds become a HardSigmoid."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.chains import Chain, chains
from quant_core.optimize.edit import constant, put_in_place
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules.one_clip import bounds_of


def hard_sigmoid(model: ir.Model, facts: Facts) -> list[Applied]:
    """Gates that exporters spell out, other than those that are met when a model is prepared
    (fuse_hard_sigmoid.py).

        Mul(a) -> Add(t) -> Clip(0, h)   =>   HardSigmoid(a / h, t / h) -> Mul(h)

    1. a > 0 and t are one number each; the Clip alone reads the sum.
    2. h is 1, so that no Mul is needed, or the Clip is a factor: then the Mul may go into what
       reads the product.

    onnxruntime merges HardSigmoid, and a hard swish made of it, into the Conv before.
    """
    applied = []
    for chain in chains(model, facts):
        clip = graph.only_reader(chain.output)
        height = None if clip is None else _height(clip, facts)
        slope = chain.affine.axis is None and chain.affine.scale[0] > 0  # 1.
        if clip is not None and height and slope and (height == 1 or _is_factor(clip)):  # 2.
            applied.append(_write(chain, clip, height))
    return applied


def _height(clip: ir.Node, facts: Facts) -> float | None:
    """h of bounds 0 and h, None if they are others."""
    found = bounds_of(clip, facts)
    if found is None or found[1][0] != 0 or math.isinf(found[1][1]) or found[1][1] <= 0:
        return None
    return found[1][1]


def _is_factor(clip: ir.Node) -> bool:
    """Whether the one reader multiplies it by a computed tensor."""
    reader = graph.only_reader(clip.outputs[0])
    if reader is None or reader.op_type != "Mul":
        return False
    return not any(graph.is_constant(v) for v in reader.inputs)


def _write(chain: Chain, clip: ir.Node, height: float) -> Applied:
    scale, shift = float(chain.affine.scale[0]), float(chain.affine.shift[0])
    name = str(clip.name)
    attributes = [
        ir.AttrFloat32("alpha", scale / height),
        ir.AttrFloat32("beta", shift / height),
    ]
    new = [ir.Node("", "HardSigmoid", [chain.source], attributes, name=name)]
    if height != 1:
        factor = constant(chain.inside, f"{name}_height", np.array(height))
        new.append(ir.Node("", "Mul", [new[0].outputs[0], factor], name=chain.names[-1]))
    put_in_place([*chain.nodes, clip], *new)
    gone = tuple(n for n in chain.names if n not in {node.name for node in new})
    return Applied("hard_sigmoid", name, gone)
