"""In which units the features of an input are, where the first weights standardize them."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.data.units import MOST, Units, first_reader
from quant_core.model import graph
from quant_core.model.constants import floats_of

# In the first weights of 100 real models the norms of two features differ by 10.5 times at most.
UNLIKE = 30.0
DEAD = 1e-12  # of the largest norm: no unit makes up for smaller ones
RIDGE = 1e-6  # of the mean square: features that depend on each other have means of their own
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"}) | graph.RECURRENT


def weighted_units(source: ir.Value) -> Units | None:
    """The units of a float input that a product reads, if the weights of its features are too
    unlike to have been trained on features of one unit.

    What standardizes an input, (x - m) / d, is often multiplied into the product behind it, whose
    weight W becomes W / d, and its bias b becomes b - (m / d) W. Here each feature's d is such that
    all weigh the same and outputs have a deviation of 1, and m such that they are nearest to 0.
    """
    product = first_reader(source)
    weight = None if product is None else _weight(product)
    if product is None or weight is None:
        return None
    features, outputs, *_ = weight.shape
    norms = np.linalg.norm(weight.reshape(features, -1), axis=1)
    used = norms > DEAD * norms.max()
    if not used.any() or norms.max() < UNLIKE * norms[used].min():
        return None
    deviations = math.sqrt(outputs / features) / np.where(used, norms, 1.0)
    slopes = deviations[:, None] * weight.reshape(features, outputs, -1).sum(2)
    squares = slopes @ slopes.T
    squares += (RIDGE * np.trace(squares) / features or 1.0) * np.eye(features)
    means = -deviations * np.linalg.solve(squares, slopes @ _bias(product, outputs))
    return Units(1 - weight.ndim, tuple(means.tolist()), tuple(deviations.tolist()))


def _weight(product: ir.Node) -> NDArray[np.float64] | None:
    """(features, outputs), with the taps of a Conv as more axes; None if it is no constant, or of
    another kind.
    """
    weight = floats_of(graph.input_at(product, 1)) if product.op_type in PRODUCTS else None
    is_other = graph.attribute(product, "transA", 0) or graph.attribute(product, "group", 1) > 1
    if weight is None or is_other:
        return None
    if product.op_type in graph.RECURRENT:
        weight = weight.reshape(-1, weight.shape[2]).T  # of (directions, gates, features)
    elif product.op_type == "Conv" or graph.attribute(product, "transB", 0):
        weight = weight.swapaxes(0, 1)
    elif weight.ndim != 2:  # a stack of them
        return None
    is_usable = len(weight) <= MOST and np.isfinite(weight).all()
    return weight if is_usable else None


def _bias(product: ir.Node, outputs: int) -> NDArray[np.float64]:
    """(outputs,): what is added to the product, zeros if it is computed or nothing is."""
    if product.op_type == "MatMul":
        reader = graph.only_reader(product.outputs[0])
        added = reader.inputs if reader is not None and reader.op_type == "Add" else ()
    else:
        added = (graph.input_at(product, 3 if product.op_type in graph.RECURRENT else 2),)
    bias = next((found for value in added if (found := floats_of(value)) is not None), np.zeros(0))
    if product.op_type in graph.RECURRENT and bias.size:  # of the inputs, and of the states
        bias = bias.reshape(len(bias), 2, -1).sum(1)
    return bias.ravel() if bias.size == outputs else np.zeros(outputs)
