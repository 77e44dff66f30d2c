"""The methods by which a weight is rounded, as a table: a method is a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from quant_core.numerics.gptq import gptq_int4, gptq_int8
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.round_nearest import quantize_int4, quantize_int8

Round = Callable[..., IntegerWeight]


@dataclass(frozen=True, slots=True)
class WeightMethod:
    """How rows (C, K) are rounded.

    int8, int4            (rows, granularity or block, *, pair_safe, floor), from the weight alone;
                          int4 to `levels` too
    gram_int8, gram_int4  (rows, gram, granularity or block, *, pair_safe, floor), where calibration
                          collected the Gram matrices of the weight's inputs; None if the method has
                          no use for them
    """

    int8: Round
    int4: Round
    gram_int8: Round | None = None
    gram_int4: Round | None = None

    @property
    def uses_gram(self) -> bool:
        """Whether calibration must collect Gram matrices."""
        return self.gram_int8 is not None


_GPTQ = WeightMethod(quantize_int8, quantize_int4, gptq_int8, gptq_int4)
WEIGHT_METHODS = {
    "rtn": WeightMethod(partial(quantize_int8, search_scale=False), quantize_int4),
    "mse": WeightMethod(quantize_int8, quantize_int4),
    "gptq": _GPTQ,
    "auto": _GPTQ,
}
