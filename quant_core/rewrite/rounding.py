"""Which integers each weight of a plan becomes, and what its bias must give back."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.gram import RoundingTarget
from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.outliers import reciprocal
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.model import graph
from quant_core.numerics.affine import Grid
from quant_core.numerics.both_axes import quantize_both_axes
from quant_core.numerics.granularity import BothAxes, Granularity, PerBlock
from quant_core.numerics.integer_weight import QMAX8, IntegerWeight, with_short_scales
from quant_core.numerics.layout import Layout
from quant_core.numerics.levels import EVEN
from quant_core.numerics.output_noise import noise_db
from quant_core.numerics.round_nearest import (
    block_width,
    fitting_levels,
    quantize_int4,
    quantize_int8,
)
from quant_core.numerics.saturation import make_any_pair_safe, scale_for_any_pair
from quant_core.numerics.standard_weight import StandardWeight, standard_weight
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.convolutions import has_other_pairs
from quant_core.plan.operators import RULES, mean_axis, weight_layout
from quant_core.plan.types import NodePlan, QuantPlan
from quant_core.rewrite.bias_correction import bias_of, corrected_bias, flat_bias
from quant_core.rewrite.weight_cache import Rounded, RoundingKey, RoundingKeys, WeightCache

ROW_SCALES = Layout((0, 1))  # of a matrix: a scale per row
Floor = NDArray[np.float64] | float


class Rounding:
    """Rounds the weights of one plan.

    deadline      when it should end: the weights after that are rounded to nearest
    sqnr_db       node -> signal to rounding noise of the worst of its weights so far, in dB
    worst_row_db  the same of the worst channel of any of them
    """

    def __init__(
        self,
        plan: QuantPlan,
        stats: Statistics | None,
        cache: WeightCache | None = None,
        deadline: Deadline = NO_DEADLINE,
    ) -> None:
        self.config = plan.config
        self.deadline = deadline
        self.stats = stats
        self.cache = WeightCache() if cache is None else cache
        self.keys = RoundingKeys(plan, stats)
        self.sqnr_db: dict[str, float] = {}
        self.worst_row_db: dict[str, float] = {}

    def integers(
        self,
        node: ir.Node,
        weight: ir.Value,
        planned: NodePlan,
        *,
        floor: Floor = 0.0,
        factors: NDArray[np.float32] | None = None,
    ) -> Rounded:
        """The weight of a node as the plan says.

        floor    scales are at least this: a number, or one per row
        factors  (K,) that the columns are multiplied by first, while the input is divided by them
                 (outliers.py)
        """
        if planned.granularity == BothAxes() and factors is None:
            of_both_axes = self._both_axes(node, weight, planned)
            if np.all(floor <= of_both_axes.integers.scale):
                return of_both_axes
        layout = weight_layout(node, weight)
        if np.any(floor):
            largest = np.abs(self._rows(node, weight, layout, factors)).max(1, initial=0.0)
            if not np.any(floor > largest / QMAX8):
                floor = 0.0  # it changes nothing: nodes that share the weight share its integers
        key = self.keys.of_node(node, weight, planned, layout, floor, factors)
        if key not in self.cache.rounded:
            began_at = time.monotonic()
            rows = self._rows(node, weight, layout, factors)
            found = self._round(node, planned, rows, floor, factors)
            if self.keys.has_short_scales:
                found = with_short_scales(found, floor)
            self.cache.rounded[key] = Rounded(
                found,
                layout,
                graph.shape_of(weight),
                *noise_db(rows, found.values, floor, self._gram(node, factors)),
            )
            self.cache.seconds += time.monotonic() - began_at
        return self._known(node, key)

    def _both_axes(self, node: ir.Node, weight: ir.Value, planned: NodePlan) -> Rounded:
        """A matrix, for all products with it and with its transpose: rounded to nearest, as what
        their inputs ask for differs.
        """
        key = self.keys.of_weight(weight, planned, ROW_SCALES)
        if key not in self.cache.rounded:
            array = graph.array(weight)
            found = quantize_both_axes(array, pair_safe=planned.pair_safe)
            db, of_rows_db = noise_db(array, found.values)
            _, of_columns_db = noise_db(array.T, found.values.T)
            self.cache.rounded[key] = Rounded(
                found, ROW_SCALES, array.shape, db, min(of_rows_db, of_columns_db)
            )
        return self._known(node, key)

    def table(self, node: ir.Node, weight: ir.Value, planned: NodePlan) -> Rounded:
        """A table (rows, ..., width) of which rows are picked: in int4, or in int8 with a scale per
        row or per column.

        Columns that are larger than others throughout (outliers of transformers) need scales of
        their own; of the two the one with less noise is taken.
        """
        key = replace(self.keys.of_weight(weight, planned, None), pair_safe=False, method="")
        if key not in self.cache.rounded:
            self.cache.rounded[key] = _round_table(graph.array(weight), planned.weight_granularity)
        return self._known(node, key)

    def standard(self, node: ir.Node, weight: ir.Value, planned: NodePlan) -> StandardWeight:
        """The weight for DequantizeLinear; 4 bits of a matrix are in blocks along K."""
        found = standard_weight(
            graph.array(weight),
            weight_layout(node, weight),
            planned.weight_granularity,
            Grid(planned.weight_storage.bits, self.config.symmetric, self.config.symmetric),
        )
        self._record(node, found.sqnr_db, found.worst_row_db)
        return found

    def corrects_bias(self, node: ir.Node) -> bool:
        """Whether calibration knows what rounding the weight takes from its outputs' means."""
        return self._target(node) is not None or self._input_means(node) is not None

    def corrected_bias(
        self,
        node: ir.Node,
        weight: ir.Value,
        rounded: Rounded,
        factors: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float64] | None:
        """(C,): the node's bias plus what rounding the weight took from each channel's mean.

        factors  as in `integers`: columns of 0 are multiplied in float, and lose nothing

        None if the operator has no bias, if it is computed or has another shape, or if there is
        nothing to write.
        """
        position = RULES[node.op_type].bias
        if position is None:
            return None
        layout, old = weight_layout(node, weight), bias_of(node)
        rows, values = layout.matrix(graph.array(weight)), rounded.rows(layout)
        if factors is not None:
            values = np.where(factors > 0, values * reciprocal(factors), rows)
        bias = flat_bias(old, len(rows))
        if old is not None and bias is None:
            return None
        target = self._target(node)
        if target is not None:
            return target.mean_shift(values) + (0 if bias is None else bias)
        means = self._input_means(node)
        if means is None:
            return bias
        exact = np.zeros(len(rows)) if bias is None else bias
        return corrected_bias(exact, rows, values, means, node)

    def _input_means(self, node: ir.Node) -> NDArray[np.float64] | None:
        """E[x] of each channel of the node's input, if biases are corrected by it."""
        if self.stats is None or not self.config.bias_correction:
            return None
        axis = mean_axis(node)
        if axis is None:
            return None
        moments = self.stats.means.get((graph.name_of(node.inputs[0]), axis))
        return None if moments is None else moments.mean

    def _known(self, node: ir.Node, key: RoundingKey) -> Rounded:
        """What the cache holds for a weight of the node, whose noise is recorded."""
        rounded = self.cache.rounded[key]
        self._record(node, rounded.sqnr_db, rounded.worst_row_db)
        return rounded

    def _record(self, node: ir.Node, found_db: float, worst_row_db: float) -> None:
        name = str(node.name)
        self.sqnr_db[name] = min(found_db, self.sqnr_db.get(name, np.inf))
        self.worst_row_db[name] = min(worst_row_db, self.worst_row_db.get(name, np.inf))

    def _target(self, node: ir.Node) -> RoundingTarget | None:
        """What is rounded in place of the weight where layers before it are rounded already."""
        return self.stats.rounding_targets.get(str(node.name)) if self.stats is not None else None

    def _rows(
        self, node: ir.Node, weight: ir.Value, layout: Layout, factors: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """What is rounded, (C, K)."""
        target = self._target(node)
        rows: NDArray[np.float32] = (
            layout.matrix(graph.array(weight)) if target is None else target.weight
        )
        return rows if factors is None else rows * factors

    def _gram(self, node: ir.Node, factors: NDArray[np.float32] | None) -> NDArray[Any] | None:
        """(G, P, k, k): Gram matrices of the node's input once it is divided by the factors."""
        if self.stats is None:
            return None
        target = self._target(node)
        gram = self.stats.gram_matrices.get(str(node.name)) if target is None else target.gram
        if gram is None or factors is None:
            return gram
        s = reciprocal(factors).reshape(gram.shape[1], -1)
        return np.asarray(gram * (s[:, :, None] * s[:, None, :]))

    def _round(
        self,
        node: ir.Node,
        planned: NodePlan,
        rows: NDArray[np.float32],
        floor: Floor,
        factors: NDArray[np.float32] | None,
    ) -> IntegerWeight:
        """Round by the config's method, with Gram matrices if it uses them and they are known."""
        method = WEIGHT_METHODS[self.config.weight_method]
        has_time = method.uses_gram and not self.deadline.is_over
        gram = self._gram(node, factors) if has_time else None
        granularity = planned.weight_granularity
        safe = planned.pair_safe
        if isinstance(granularity, PerBlock):
            columns = rows.shape[1] if gram is None else gram.shape[-1]
            block = block_width(columns, granularity.size)
            levels = fitting_levels(rows, block) if granularity.may_be_uneven else EVEN
            if gram is None or method.gram_int4 is None:
                return method.int4(rows, block, pair_safe=safe, floor=floor, levels=levels)
            return method.gram_int4(rows, gram, block, pair_safe=safe, floor=floor, levels=levels)
        # Kernels differ in which weights of a row are neighbours: any two must be safe.
        is_any_pair = safe and self.keys.pairs_channels and has_other_pairs(node)
        if is_any_pair:
            floor = np.maximum(floor, scale_for_any_pair(rows))
        if gram is None or method.gram_int8 is None:
            found = method.int8(rows, granularity, pair_safe=safe, floor=floor)
        else:
            found = method.gram_int8(rows, gram, granularity, pair_safe=safe, floor=floor)
        if is_any_pair:  # rounding with Gram matrices goes beyond the largest
            found = replace(found, q=make_any_pair_safe(found.q))
        return found


def _round_table(array: NDArray[np.float32], granularity: Granularity) -> Rounded:
    """A table (rows, ..., width), in blocks of a row, or with the scales of rows or columns."""
    *outer, height, width = range(array.ndim)
    by_row = Layout((*outer, height, width), channel_dims=array.ndim - 1)
    by_column = Layout((*outer, width, height), channel_dims=array.ndim - 1)
    if isinstance(granularity, PerBlock):
        tried = [(by_row, quantize_int4(by_row.matrix(array), granularity.size))]
    else:
        layouts = (by_row, by_column)
        tried = [(at, quantize_int8(at.matrix(array), granularity)) for at in layouts]
    found = [Rounded(q, at, array.shape, *noise_db(at.matrix(array), q.values)) for at, q in tried]
    return max(found, key=lambda rounded: rounded.sqnr_db)
