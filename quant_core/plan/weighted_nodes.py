"""How a node with weights computes, how its weights are stored, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from quant_core.config import Mode, QuantConfig
from quant_core.model import files, graph
from quant_core.model.origins import matches
from quant_core.numerics.float16 import is_float16, why_not_float16
from quant_core.numerics.granularity import Granularity, PerBlock, PerChannel, PerTensor
from quant_core.numerics.output_noise import parts_of
from quant_core.numerics.round_nearest import block_width
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.choose_compute import choose_compute
from quant_core.plan.convolutions import has_depthwise_kernel, has_other_pairs
from quant_core.plan.operators import (
    KERNEL_BLOCKS,
    RULES,
    DynamicPattern,
    rule_of,
    weight_layout,
    weight_positions,
)
from quant_core.plan.targets import Target
from quant_core.plan.types import Compute, NodeChoice, NodePlan, Storage
from quant_core.text import joined

# Weights of an output channel: with fewer, multipliers and scales take the bytes that 4 bits save,
# and the rounding error is largest (depthwise). Judge a change with `python -m tests.bench.int4`.
MIN_INT4_COLUMNS = 32
MIN_INT4_ELEMENTS = 700  # of a weight: to decode it takes 340 bytes of nodes, and saves .48 of each
# Of all weights: the smallest layers together save next to nothing in fewer bits, and the first are
# among them.
SMALL_SHARE = 1 / 64
# Of all weights: those in 16 bits instead of 8, where that takes no time. Depthwise Convs have few
# weights and much of the noise. Judge a change with `python -m tests.bench.accuracy`.
SMALL_SHARE_IN_FLOAT = 1 / 32
NO_CHOICE = NodeChoice()
IS_FINITE = "quantmill.is_finite"  # key in the metadata of a tensor


def has_weights(node: ir.Node) -> bool:
    """Whether the node has a constant float weight that can be quantized."""
    return rule_of(node) is not None and bool(float_weights(node))


def float_weights(node: ir.Node) -> list[ir.Value]:
    """The constant float weights of the node."""
    rule = RULES[node.op_type]
    values = [graph.input_at(node, i) for i in weight_positions(node)]
    found = [v for v in values if v is not None and graph.is_float_weight(v)]
    if not rule.is_table:
        return found
    are_rows = graph.attribute(node, "axis", 0) == 0
    return found if are_rows else []


def is_folded(config: QuantConfig, target: Target) -> bool:
    """Whether weights of float operators become float32 once, when onnxruntime loads the model.

    Otherwise they are behind the standard DequantizeLinear, which other runtimes know as well.
    """
    return target.is_onnxruntime and config.runtime == "folded" and config.symmetric


@dataclass(frozen=True, slots=True)
class WeightedNodes:
    """Steps 1 to 3 of `make_plan`: what becomes of nodes with weights.

    former  node -> names of nodes of the original model that it stands for
    """

    config: QuantConfig
    target: Target
    choices: Mapping[str, NodeChoice]
    keeps_float16: bool
    former: Mapping[str, Sequence[str]]

    def choice(self, node: str) -> NodeChoice:
        return self.choices.get(node, NO_CHOICE)

    def node(self, node: ir.Node, mode: str) -> NodePlan:
        """How a node with weights computes and stores them, where `mode` asks for a way of
        computing.
        """
        choice = self.choice(str(node.name))
        weights = float_weights(node)
        names = tuple(str(w.name) for w in weights)
        elements = sum(math.prod(graph.shape_of(w)) for w in weights)
        in_float = NodePlan(
            str(node.name),
            node.op_type,
            Compute.FLOAT,
            self._float_storage(weights),
            names,
            elements,
        )
        excluded = self._exclusion(in_float)
        if excluded:
            return kept_in_float(in_float, weights, excluded)
        named = self._named_bits(in_float)
        storage = choice.storage or Storage.of_bits(self.config.bits if named is None else named)
        if not storage.is_integer:
            is_named = named is not None
            reason = f"layer_bits {storage.bits}" if is_named else "fewer bits were found worse"
            return kept_in_float(replace(in_float, storage=storage), weights, reason)
        obstacle = self._why_not_integers(in_float, weights)
        if obstacle:
            return kept_in_float(in_float, weights, obstacle)
        compute, reason = choose_compute(node, self.target, mode, choice)
        if storage is Storage.INT4:
            is_named = named is not None or choice.storage is not None
            obstacle = self._why_not_int4(node, weights, compute, is_named=is_named)
            if obstacle:
                storage, reason = Storage.INT8, joined((reason, f"int8: {obstacle}"))
        return self._rounded(
            replace(in_float, compute=compute, reason=reason), node, storage, choice
        )

    def _exclusion(self, planned: NodePlan) -> str:
        """Which glob of the config excludes the node; "" if none does."""
        names = self._names(planned)
        globs = (glob for glob in self.config.exclude if matches(glob, *names))
        return next((f"excluded by {glob}" for glob in globs), "")

    def _why_not_integers(self, planned: NodePlan, weights: list[ir.Value]) -> str:
        """Why the weights of the node stay float, whatever bits were asked for; "" if they need
        not.
        """
        config, target = self.config, self.target
        if planned.elements < config.min_elements:
            return f"{planned.elements} elements, fewer than min_elements {config.min_elements}"
        if planned.op_type in target.only_constants and config.mode != Mode.WEIGHT_ONLY:
            return f"{target.name} takes only constants as weights of {planned.op_type}"
        broken = (w for w in weights if not _is_finite(w))
        return next((f"{weight.name} holds NaN or inf" for weight in broken), "")

    def _float_storage(self, weights: list[ir.Value]) -> Storage:
        """How weights that stay float are stored: float16 if the config or their file says so."""
        if self.keeps_float16 and all(is_float16(graph.array(w)) for w in weights):
            return Storage.FLOAT16
        return Storage(self.config.float_storage)

    def smallest(
        self,
        plans: Iterable[NodePlan],
        candidates: Iterable[NodePlan],
        share: float = SMALL_SHARE,
    ) -> Iterator[NodePlan]:
        """The smallest of the candidates, which together hold no more than this share of all
        weights.

        Where a node's bits were chosen by name, they stay.
        """
        left = share * sum(n.elements for n in plans)
        for planned in sorted(candidates, key=lambda n: n.elements):
            left -= planned.elements
            if left < 0:
                return
            if self._named_bits(planned) is None and self.choice(planned.node).storage is None:
                yield planned

    def changed(
        self,
        node: ir.Node,
        planned: NodePlan,
        reason: str,
        *,
        compute: Compute | None = None,
        storage: Storage | None = None,
    ) -> NodePlan:
        """The plan of a rounded node that computes or stores its weights in another way."""
        changed = replace(
            planned,
            compute=compute or planned.compute,
            reason=joined((planned.reason, reason)),
        )
        return self._rounded(
            changed, node, storage or planned.weight_storage, self.choice(planned.node)
        )

    def _named_bits(self, planned: NodePlan) -> int | None:
        """The bits that layer_bits gives the node or one of its weights; the last match counts."""
        names = self._names(planned)
        bits = [bits for glob, bits in self.config.layer_bits.items() if matches(glob, *names)]
        return bits[-1] if bits else None

    def _names(self, planned: NodePlan) -> tuple[str, ...]:
        """The names by which a glob can mean the node: its own, former ones, its weights'."""
        return (planned.node, *self.former.get(planned.node, ()), *planned.weights)

    def _rounded(
        self, planned: NodePlan, node: ir.Node, storage: Storage, choice: NodeChoice
    ) -> NodePlan:
        """The plan with its weights rounded to this storage: blocks only where their kernel takes
        them.
        """
        compute = planned.compute
        granularity = self._granularity(node, storage, compute, choice)
        # blocks that gave way to other divisors of the columns are narrower or wider than asked
        is_as_asked = granularity == PerBlock(self.config.block_size)
        if compute is Compute.BLOCKS and not (is_as_asked and granularity in KERNEL_BLOCKS):
            compute = Compute.DYNAMIC
            granularity = self._granularity(node, storage, compute, choice)
        adds_pairs = compute in (Compute.STATIC, Compute.DYNAMIC) and not has_depthwise_kernel(node)
        return replace(
            planned,
            compute=compute,
            storage=storage,
            granularity=granularity,
            pair_safe=adds_pairs and self.target.saturates,
        )

    def _granularity(
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

    def _why_not_int4(
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


def kept_in_float(planned: NodePlan, weights: list[ir.Value], reason: str) -> NodePlan:
    """The plan of a node that stays float: in float32 where float16 cannot hold its weights."""
    if planned.storage is Storage.FLOAT16:
        obstacles = (why_not_float16(graph.array(w)) for w in weights)
        obstacle = next(filter(None, obstacles), "")
        if obstacle:
            reason = f"{reason}; float32: {obstacle}"
            return replace(planned, storage=Storage.FLOAT32, reason=reason)
    return replace(planned, reason=reason)


def _columns(node: ir.Node, weight: ir.Value) -> int:
    """Weights of one output channel."""
    return weight_layout(node, weight).columns(graph.shape_of(weight))


def _is_finite(weight: ir.Value) -> bool:
    """Found once for a tensor, which no one changes: a search makes many plans of a model."""
    tensor = weight.const_value
    known: MutableMapping[str, Any] = {} if tensor is None else tensor.meta
    if IS_FINITE not in known:
        known[IS_FINITE] = bool(np.isfinite(graph.array(weight)).all())
        files.release(tensor)
    return bool(known[IS_FINITE])
