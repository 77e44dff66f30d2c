"""Which integers each weight of a plan becomes, and what its bias must give back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.gram import RoundingTarget
from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.outliers import reciprocal
from quant_core.config import QuantConfig
from quant_core.model import graph
from quant_core.numerics.affine import Grid, choose_params, dequantize, quantize, range_of
from quant_core.numerics.gptq import gptq_int4, gptq_int8
from quant_core.numerics.granularity import Granularity, PerTensor
from quant_core.numerics.weights import (
    QMAX8,
    IntegerWeight,
    Layout,
    block_width,
    layout_of,
    quantize_int4,
    quantize_int8,
)
from quant_core.plan.operators import channel_axis
from quant_core.plan.types import Storage
from quant_core.rewrite.bias_correction import corrected_bias

TABLES = (Layout((0, 1)), Layout((1, 0)))  # a scale per row, a scale per column
Floor = NDArray[np.float64] | float


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A weight as integers, how it lies in its operator, and its signal to rounding noise in dB."""

    integers: IntegerWeight
    layout: Layout
    shape: tuple[int, ...]
    sqnr_db: float


@dataclass(slots=True)
class Rounding:
    """Rounds weights, each once for all nodes, plans and candidates that share it.

    sqnr_db  node -> the worst of its weights so far
    """

    config: QuantConfig
    stats: Statistics | None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    _memo: dict[Any, Any] = field(default_factory=dict)

    def integers(
        self, node: ir.Node, weight: ir.Value, storage: Storage, *, safe: bool = False,
        granularity: Granularity | None = None,
        floor: Floor = 0.0, factors: NDArray[np.float32] | None = None,
    ) -> Rounded:  # fmt: skip
        """The weight of a node in int8 or int4; `safe`: no pair can saturate int16; scales are at least `floor`.

        granularity  of int8; None is the config's
        factors    (K,) that the columns are multiplied by first, and the inputs are divided by (outliers.py)
        """
        shape = graph.shape_of(weight)
        layout = layout_of(node, len(shape))
        if np.any(floor) and not np.any(
            floor > np.abs(self._rows(node, weight, layout, factors)).max(1) / QMAX8
        ):
            floor = (
                0.0  # it changes nothing, and nodes that share the weight can share its integers
            )
        config = self.config
        if granularity == PerTensor():
            config = replace(config, per_channel=False)
        memo = self._memo if self.stats is None else self.stats.memo
        eased = (graph.name_of(node.inputs[0]), factors.tobytes()) if factors is not None else None
        key = (weight.name, eased, layout, storage, safe, float(np.max(floor)),
               config.per_channel, config.weight_method, config.block_size)  # fmt: skip
        if key not in memo:  # and only then is the weight read
            rows = self._rows(node, weight, layout, factors)
            found = self._round(
                rows, storage, self._gram(node, factors), config.per_channel, safe, floor
            )
            memo[key] = Rounded(found, layout, shape, _sqnr_db(rows, found.values))
        rounded: Rounded = memo[key]
        name = str(node.name)
        self.sqnr_db[name] = min(rounded.sqnr_db, self.sqnr_db.get(name, np.inf))
        return rounded

    def table(self, node: ir.Node, weight: ir.Value, storage: Storage) -> Rounded:
        """An embedding table (rows, width): in int8, with a scale per row or per column, whichever is nearer; or int4.

        Columns that are larger than others throughout (outliers of transformers) need scales of their own.
        """
        memo = self._memo if self.stats is None else self.stats.memo
        key = ("table", weight.name, storage, self.config.per_channel, self.config.block_size)
        if key not in memo:
            array, config = graph.array(weight), self.config
            if storage is Storage.INT4:
                found = [(TABLES[0], quantize_int4(array, config.block_size))]
            else:
                found = [
                    (at, quantize_int8(at.matrix(array), per_channel=config.per_channel))
                    for at in TABLES
                ]
            tried = [
                Rounded(q, at, array.shape, _sqnr_db(at.matrix(array), q.values)) for at, q in found
            ]
            memo[key] = max(tried, key=lambda rounded: rounded.sqnr_db)
        best: Rounded = memo[key]
        self.sqnr_db[str(node.name)] = best.sqnr_db
        return best

    def standard(
        self, node: ir.Node, weight: ir.Value, bits: int
    ) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any], int | None, int | None]:
        """(integers, scale, zero_point, axis, block) for DequantizeLinear; 4 bits of a matrix are in blocks along K."""
        array, config = graph.array(weight), self.config
        axis = channel_axis(node, weight) if config.per_channel else None
        block = None
        if bits == 4 and node.op_type in ("MatMul", "Gemm") and array.ndim == 2:
            axis = 1 - channel_axis(node, weight)
            block = (
                config.block_size
                if array.shape[axis] % config.block_size == 0
                else array.shape[axis]
            )
        params = choose_params(
            *range_of(array, axis, block),
            Grid(bits, config.symmetric, config.symmetric),
            axis,
            block,
        )
        q = quantize(array, params)
        self.sqnr_db[str(node.name)] = _sqnr_db(array, dequantize(q, params))
        return q, params.scale, params.zero_point, axis, block

    def bias(
        self, node: ir.Node, bias: NDArray[np.float64] | None, weight: ir.Value, rounded: Rounded
    ) -> Any:
        """The bias (C,) plus what rounding took from each channel's mean; None if there is neither."""
        means = (
            self.stats.means.get(graph.name_of(node.inputs[0])) if self.stats is not None else None
        )
        if (target := self._target(node)) is not None:
            return target.mean_shift(rounded.integers.values) + (0 if bias is None else bias)
        if not self.config.bias_correction or means is None:
            return bias
        rows, values = rounded.layout.matrix(graph.array(weight)), rounded.integers.values
        return corrected_bias(
            np.zeros(len(rows)) if bias is None else bias, rows, values, means.mean, node
        )

    def _rows(
        self, node: ir.Node, weight: ir.Value, layout: Layout, factors: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        """What is rounded, (C, K)."""
        target = self._target(node)
        rows: NDArray[np.float32] = (
            layout.matrix(graph.array(weight)) if target is None else target.weight
        )
        return rows if factors is None else rows * factors

    def _target(self, node: ir.Node) -> RoundingTarget | None:
        return self.stats.rounding_targets.get(str(node.name)) if self.stats is not None else None

    def _gram(self, node: ir.Node, factors: NDArray[np.float32] | None) -> NDArray[Any] | None:
        if self.stats is None or self.config.weight_method not in ("auto", "gptq"):
            return None
        target = self._target(node)
        gram = self.stats.gram_matrices.get(str(node.name)) if target is None else target.gram
        if gram is None or factors is None:
            return gram
        s = reciprocal(factors).reshape(gram.shape[1], -1)
        return np.asarray(gram * (s[:, :, None] * s[:, None, :]))

    def _round(
        self,
        rows: NDArray[Any],
        storage: Storage,
        gram: NDArray[Any] | None,
        per_channel: bool,
        safe: bool,
        floor: Floor,
    ) -> IntegerWeight:
        """By GPTQ where calibration knows how the inputs vary."""
        method = self.config.weight_method
        if storage is Storage.INT4:
            block = block_width(
                rows.shape[1] if gram is None else gram.shape[-1], self.config.block_size
            )
            if gram is None:
                return quantize_int4(rows, block, safe=safe, floor=floor)
            return gptq_int4(rows, gram, block, safe=safe, floor=floor)
        if gram is None:
            return quantize_int8(
                rows, per_channel=per_channel, safe=safe, floor=floor, method=method
            )
        return gptq_int8(rows, gram, per_channel=per_channel, safe=safe, floor=floor)


def flat_bias(value: ir.Value | None, channels: int) -> NDArray[np.float64] | None:
    """The constant bias as (channels,), None if it is absent, computed or of another shape."""
    found = graph.constant(value)
    if found is None or (
        found.size != 1 and (found.size != channels or found.shape[-1] != channels)
    ):
        return None
    return np.asarray(np.broadcast_to(found.reshape(-1), (channels,)), np.float64)


def _sqnr_db(exact: NDArray[Any], rounded: NDArray[Any]) -> float:
    noise = float(np.square(exact - rounded, dtype=np.float64).sum())
    power = float(np.square(exact, dtype=np.float64).sum())
    return 10 * float(np.log10(max(power, 1e-30) / noise)) if noise else 200.0
