"""What rounding a weight does to each channel's mean output, given back to the node's bias.

Source: Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction
(arXiv 1906.04721), section 4.2, with the mean inputs measured instead of derived.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.plan.operators import RULES


def corrected_bias(
    bias: NDArray[np.float64],
    rows: NDArray[Any],
    rounded: NDArray[Any],
    means: NDArray[np.float64],
    node: ir.Node,
) -> NDArray[np.float64]:
    """bias + sum over the inputs of (W - Wq) * E[x]: (C,).

    rows, rounded  (C, K), K as the node's layout orders it: the input channel varies fastest
    means          E[x] of each channel of the node's input; of a Conv with groups, of all groups
                   one after another
    """
    groups = graph.attribute(node, "group", 1) if node.op_type == "Conv" else 1
    inputs = len(means) // groups
    error = (
        (rows.astype(np.float64) - rounded).reshape(groups, len(rows) // groups, -1, inputs).sum(2)
    )
    return np.asarray(
        bias + np.einsum("goi,gi->go", error, means.reshape(groups, inputs)).reshape(-1)
    )


def bias_of(node: ir.Node) -> ir.Value | None:
    """The bias that the node has."""
    return graph.input_at(node, RULES[node.op_type].bias)


def flat_bias(value: ir.Value | None, channels: int) -> NDArray[np.float64] | None:
    """The constant bias as (channels,), None if it is absent, computed or of another shape."""
    found = graph.constant(value)
    if found is None:
        return None
    if found.size != 1 and (found.size != channels or found.shape[-1] != channels):
        return None
    return np.asarray(np.broadcast_to(found.reshape(-1), (channels,)), np.float64)
