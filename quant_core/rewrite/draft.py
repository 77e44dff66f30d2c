"""The private copy of a model that `apply_plan` edits, and what was already written into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.numerics.affine import QuantParams
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.plan.targets import TARGETS, Target
from quant_core.plan.types import QuantPlan, Storage
from quant_core.rewrite.emit_dynamic import DynamicInput, StoredWeight
from quant_core.rewrite.rounding import Rounding
from quant_core.rewrite.weight_cache import Rounded
from quant_core.rewrite.writer import Writer


@dataclass(frozen=True, slots=True)
class FloatKey:
    """Which weight of a float operator was written: one value serves all operators that read it
    alike.
    """

    weight: ir.Value
    storage: Storage
    layout: Layout


@dataclass(frozen=True, slots=True)
class Written:
    """What stands in the copy already, for nodes that share a weight or an input.

    static    integers -> what the DequantizeLinear of a static weight gives
    products  (integers, how they lie) -> the weight of dynamic products
    blocks    integers -> the weight of products in blocks of 4 bits
    floats    weight of a float operator -> the value that it reads instead
    standard  (weight of a float operator, storage) -> what the standard DequantizeLinear gives, and
              its integers if an integer operator could read them
    float16   constant -> that constant, cast back from float16
    inputs    (tensor, graph that reads it) -> what quantizes it at run time
    pixels    tensor -> what quantizes it at run time, with its channels last
    biases    static node -> its int32 bias
    integers  weight -> how it is stored as integers first, by any node
    factors   tensor -> (K,) by which all dynamic nodes that read it divide it
    """

    static: dict[IntegerWeight, ir.Value] = field(default_factory=dict)
    products: dict[tuple[IntegerWeight, Layout], StoredWeight] = field(default_factory=dict)
    blocks: dict[IntegerWeight, StoredWeight] = field(default_factory=dict)
    floats: dict[FloatKey, ir.Value] = field(default_factory=dict)
    standard: dict[tuple[ir.Value, Storage], tuple[ir.Value, Rounded | None]] = field(
        default_factory=dict
    )
    float16: dict[ir.Value, ir.Value] = field(default_factory=dict)
    inputs: dict[tuple[ir.Value, ir.Graph], DynamicInput] = field(default_factory=dict)
    pixels: dict[ir.Value, DynamicInput] = field(default_factory=dict)
    biases: dict[ir.Node, ir.Value] = field(default_factory=dict)
    integers: dict[ir.Value, Rounded] = field(default_factory=dict)
    factors: dict[ir.Value, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """A model that is being rewritten in place.

    nodes   name -> node of the copy, for all that the plan may name
    params  tensor whose range others share -> how activations with this range are quantized
    """

    model: ir.Model
    plan: QuantPlan
    stats: Statistics | None
    nodes: Mapping[str, ir.Node]
    params: Mapping[str, QuantParams]
    rounding: Rounding
    writer: Writer
    written: Written = field(default_factory=Written)

    @property
    def target(self) -> Target:
        """Where the model will run."""
        return TARGETS[self.plan.target]
