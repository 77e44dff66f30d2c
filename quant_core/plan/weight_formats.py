"""How many of a node's weights share a scale, and why 4 bits are not for some."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.model import graph
from quant_core.numerics.granularity import Granularity, PerBlock, PerChannel, PerTensor
from quant_core.numerics.output_noise import parts_of
from quant_core.numerics.round_nearest import block_width
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.convolutions import has_other_pairs
from quant_core.plan.operators import RULES, DynamicPattern, float_weights, weight_layout
from quant_core.plan.targets import Target
from quant_core.plan.types import Compute, NodeChoice, Storage

# Weights of an output channel: with fewer, multipliers and scales take the bytes that 4 bits save,
# and the rounding error is largest (depthwise). Judge a change with `python -m tests.bench.int4`.
MIN_INT4_COLUMNS = 32
MIN_INT4_ELEMENTS = 700  # of a weight: to decode it takes 340 bytes of nodes, and saves .48 of each


def is_folded(config: QuantConfig, target: Target) -> bool:
    """Whether weights of float operators become float32 once, when onnxruntime loads the model.

    Otherwise they are behind the standard DequantizeLinear, which other runtimes know as well.
    """
    return target.is_onnxruntime and config.runtime == "folded" and config.symmetric


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """In which integers a target and a config have weights stored."""

    config: QuantConfig
    target: Target

    def granularity(
        self, node: ir.Node, storage: Storage, compute: Compute, choice: NodeChoice
    ) -> Granularity:
        """How many of the node's weights share a scale.

        In 8 bits, fewer than the config says where that was chosen, more only if the node is
        dynamic, or the target knows one scale for its operator. In 4 bits, blocks as wide as was
        chosen, but for kernels that take the config's.
        """
        config, weights = self.config, float_weights(node)
        is_per_channel = config.per_channel or choice.granularity == PerChannel()
        is_per_channel = is_per_channel and node.op_type not in self.target.one_scale
        by_config: Granularity = PerChannel() if is_per_channel else PerTensor()
        is_table = RULES[node.op_type].is_table
        if compute is Compute.FLOAT and not is_table and not is_folded(config, self.target):
            blocks = self._standard_blocks(node) if storage is Storage.INT4 else []
            return blocks[0] if blocks else by_config
        if storage is Storage.INT4:
            wanted = config.block_size
            if isinstance(choice.granularity, PerBlock) and compute is not Compute.BLOCKS:
                wanted = wanted if is_table else choice.granularity.size
            widths = {self._block_width(node, w, wanted) for w in weights}
            size = widths.pop() if len(widths) == 1 else wanted
            # MatMulNBits and GatherBlockQuantized know even levels alone, other runtimes no nodes
            # that look levels up
            is_fixed = is_table or compute is Compute.BLOCKS or not self.target.is_onnxruntime
            return PerBlock(size, may_be_uneven=not is_fixed)
        if compute is Compute.DYNAMIC and choice.granularity == PerTensor():
            return PerTensor()
        return by_config

    def why_not_int4(
        self, node: ir.Node, weights: list[ir.Value], compute: Compute, *, is_named: bool
    ) -> str:
        """Why 4 bits are not for this node, "" if they are; few columns matter only if nobody named
        it.
        """
        rule, config = RULES[node.op_type], self.config
        columns = min(_columns(node, w) for w in weights)
        if columns < MIN_INT4_COLUMNS and not is_named:
            return f"{columns} weights a channel are too few for 4 bits"
        elements = min(math.prod(graph.shape_of(w)) for w in weights)
        is_decoded = is_folded(config, self.target) and compute is not Compute.BLOCKS
        if elements < MIN_INT4_ELEMENTS and is_decoded and not (rule.is_table or is_named):
            return f"{elements} weights are too few for 4 bits"
        if compute is Compute.DYNAMIC and rule.dynamic_pattern is DynamicPattern.LSTM:
            return f"{node.op_type} takes whole bytes"
        if compute.is_integer and not self.target.decodes_int4:
            return f"integer kernels of {self.target.name} take whole bytes"
        if compute.is_integer and self.target.pairs_channels and has_other_pairs(node):
            return f"pairs of an odd number of channels can saturate on {self.target.name}"
        if not (rule.is_table or is_folded(config, self.target) or self._standard_blocks(node)):
            if node.op_type in self.target.one_scale:
                return f"{node.op_type} has one scale on {self.target.name}: too few for 4 bits"
            if not self.target.int4_per_channel:
                sizes = " or ".join(map(str, self.target.block_sizes))
                return f"{self.target.name} takes 4 bits in a matrix, in blocks of {sizes}"
        if rule.is_table:
            if not is_folded(config, self.target):
                return f"{node.op_type} takes whole bytes"
            is_matrix = len(graph.shape_of(weights[0])) == 2
            if is_matrix and columns % config.block_size:  # GatherBlockQuantized takes whole blocks
                return f"blocks of {config.block_size} do not divide rows of {columns}"
        return ""

    def _standard_blocks(self, node: ir.Node) -> list[PerBlock]:
        """The blocks of 4-bit weights that the target's DequantizeLinear takes here, those nearest
        to the config's first; none but of matrices.
        """
        if RULES[node.op_type].dynamic_pattern is not DynamicPattern.MATMUL:
            return []
        columns = _columns(node, float_weights(node)[0])
        fitting = [size for size in self.target.block_sizes if columns % size == 0]
        return [PerBlock(s) for s in sorted(fitting, key=lambda s: abs(s - self.config.block_size))]

    def _block_width(self, node: ir.Node, weight: ir.Value, wanted: int) -> int:
        """The divisor of the columns nearest to the wanted width; of those of one Gram matrix, if
        there are several.
        """
        columns = _columns(node, weight)
        if RULES[node.op_type].has_gram and WEIGHT_METHODS[self.config.weight_method].uses_gram:
            columns //= parts_of(columns) or 1
        return block_width(columns, wanted)


def _columns(node: ir.Node, weight: ir.Value) -> int:
    """Weights of one output channel."""
    return weight_layout(node, weight).columns(graph.shape_of(weight))
