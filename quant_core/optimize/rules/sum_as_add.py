"""A Sum of two tensors is an Add, which other rules and integer kernels know."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.facts import Facts


def sum_as_add(model: ir.Model, facts: Facts) -> list[Applied]:
    """Sum(a, b)   =>   Add(a, b), as Caffe2 and PaddlePaddle write the ends of residual blocks."""
    applied = []
    for node in graph.nodes_of(model, "Sum"):
        if len(node.inputs) == 2:
            node.op_type = "Add"
            applied.append(Applied("sum_as_add", str(node.name), ()))
    return applied
