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
from quant_core.numerics.granularity import PerBlock
from quant_core.plan.choose_compute import choose_compute
from quant_core.plan.convolutions import has_depthwise_kernel
from quant_core.plan.operators import (
    KERNEL_BLOCKS,
    float_weights,
)
from quant_core.plan.targets import Target
from quant_core.plan.types import Compute, NodeChoice, NodePlan, Storage
from quant_core.plan.weight_formats import WeightFormats
from quant_core.text import joined

# Of all weights: the smallest layers together save next to nothing in fewer bits, and the first are
# among them.
SMALL_SHARE = 1 / 64
# Of all weights: those in 16 bits instead of 8, where that takes no time. Depthwise Convs have few
# weights and much of the noise. Judge a change with `python -m tests.bench.accuracy`.
SMALL_SHARE_IN_FLOAT = 1 / 32
NO_CHOICE = NodeChoice()
IS_FINITE = "quantmill.is_finite"  # key in the metadata of a tensor


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

    @property
    def formats(self) -> WeightFormats:
        return WeightFormats(self.config, self.target)

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
            obstacle = self.formats.why_not_int4(node, weights, compute, is_named=is_named)
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
        granularity = self.formats.granularity(node, storage, compute, choice)
        # blocks that gave way to other divisors of the columns are narrower or wider than asked
        is_as_asked = granularity == PerBlock(self.config.block_size)
        if compute is Compute.BLOCKS and not (is_as_asked and granularity in KERNEL_BLOCKS):
            compute = Compute.DYNAMIC
            granularity = self.formats.granularity(node, storage, compute, choice)
        adds_pairs = compute in (Compute.STATIC, Compute.DYNAMIC) and not has_depthwise_kernel(node)
        return replace(
            planned,
            compute=compute,
            storage=storage,
            granularity=granularity,
            pair_safe=adds_pairs and self.target.saturates,
        )


def kept_in_float(planned: NodePlan, weights: list[ir.Value], reason: str) -> NodePlan:
    """The plan of a node that stays float: in float32 where float16 cannot hold its weights."""
    if planned.storage is Storage.FLOAT16:
        obstacles = (why_not_float16(graph.array(w)) for w in weights)
        obstacle = next(filter(None, obstacles), "")
        if obstacle:
            reason = f"{reason}; float32: {obstacle}"
            return replace(planned, storage=Storage.FLOAT32, reason=reason)
    return replace(planned, reason=reason)


def _is_finite(weight: ir.Value) -> bool:
    """Found once for a tensor, which no one changes: a search makes many plans of a model."""
    tensor = weight.const_value
    known: MutableMapping[str, Any] = {} if tensor is None else tensor.meta
    if IS_FINITE not in known:
        known[IS_FINITE] = bool(np.isfinite(graph.array(weight)).all())
        files.release(tensor)
    return bool(known[IS_FINITE])
