"""The rules by name, in order of what they gained on real models.

A rule edits a private copy in place and returns what it changed. Those of EXACT leave fewer or
cheaper operators, whatever the machine; those of PRUNE too, where the config asks for them. Those
of TIMED stay only where the model is measured to be faster; they change only nodes that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules.affine_as_conv import affine_as_conv
from quant_core.optimize.rules.common_subexpressions import common_subexpressions
from quant_core.optimize.rules.empty_pads import empty_pads
from quant_core.optimize.rules.flat_images import flat_images
from quant_core.optimize.rules.fold_affine import fold_into_consumers, fold_into_producer
from quant_core.optimize.rules.hard_sigmoid import hard_sigmoid
from quant_core.optimize.rules.hoist_products import hoist_products
from quant_core.optimize.rules.inner_softmax import inner_softmax
from quant_core.optimize.rules.known_sizes import known_sizes
from quant_core.optimize.rules.layer_norm import inner_layer_norm, layer_norm
from quant_core.optimize.rules.merge_affine import merge_affine
from quant_core.optimize.rules.merge_convs import merge_parallel_convs, merge_successive_convs
from quant_core.optimize.rules.named_sizes import named_sizes
from quant_core.optimize.rules.one_clip import one_clip
from quant_core.optimize.rules.one_reshape import one_reshape
from quant_core.optimize.rules.pixel_gemms import pixel_gemms
from quant_core.optimize.rules.plain_gelu import plain_gelu
from quant_core.optimize.rules.plain_softmax import plain_softmax
from quant_core.optimize.rules.prelu import max_as_leaky_relu, prelu_as_convs, prelu_as_leaky_relu
from quant_core.optimize.rules.split_convs import split_convs
from quant_core.optimize.rules.stack_outputs import stack_outputs
from quant_core.optimize.rules.static_shapes import static_shapes
from quant_core.optimize.rules.sum_as_add import sum_as_add
from quant_core.optimize.rules.transposed_weights import transposed_weights
from quant_core.optimize.rules.unread_pixels import unread_pixels
from quant_core.optimize.rules.unread_rows import unread_rows
from quant_core.optimize.rules.wide_kernels import wide_kernels
from quant_core.optimize.rules.zero_channels import zero_channels

Exact: TypeAlias = Callable[[ir.Model, Facts], list[Applied]]
Timed: TypeAlias = Callable[[ir.Model, Facts, Chosen], list[Applied]]

EXACT: dict[str, Exact] = {
    "fold_into_producer": fold_into_producer,
    "fold_into_consumers": fold_into_consumers,
    "merge_affine": merge_affine,
    "one_clip": one_clip,
    "hard_sigmoid": hard_sigmoid,
    "plain_gelu": plain_gelu,
    "layer_norm": layer_norm,
    "sum_as_add": sum_as_add,
    "empty_pads": empty_pads,
    "merge_parallel_convs": merge_parallel_convs,
    "merge_successive_convs": merge_successive_convs,
    "known_sizes": known_sizes,
    "common_subexpressions": common_subexpressions,
    "plain_softmax": plain_softmax,
    "static_shapes": static_shapes,
    "prelu_as_leaky_relu": prelu_as_leaky_relu,
    "max_as_leaky_relu": max_as_leaky_relu,
    "named_sizes": named_sizes,
    "unread_rows": unread_rows,
    "unread_pixels": unread_pixels,
    "one_reshape": one_reshape,
    "transposed_weights": transposed_weights,
}
# What `QuantConfig.prune` may ask for -> its rules.
PRUNE: dict[str, dict[str, Exact]] = {
    "none": {},
    "zero-channels": {"zero_channels": zero_channels},
}
TIMED: dict[str, Timed] = {
    "affine_as_conv": affine_as_conv,
    "wide_kernels": wide_kernels,
    "flat_images": flat_images,
    "pixel_gemms": pixel_gemms,
    "prelu_as_convs": prelu_as_convs,
    "inner_softmax": inner_softmax,
    "inner_layer_norm": inner_layer_norm,
    "split_convs": split_convs,
    "stack_outputs": stack_outputs,
    "hoist_products": hoist_products,
}
# Those of TIMED that gain in float alone: integer kernels have no blocked layout to reach.
FOR_FLOAT_CONVS = frozenset({"flat_images"})
