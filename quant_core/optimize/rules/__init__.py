"""The rules by name, in order of what they gained on real models.

A rule edits a private copy in place and returns what it changed. One that is not `timed` leaves
fewer or cheaper operators on every machine; a timed one stays only if the model is measured to be
faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from quant_core.optimize.applied import Applied
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules.affine_as_conv import affine_as_conv
from quant_core.optimize.rules.fold_affine import (
    fold_into_consumers,
    fold_into_producer,
    merge_affine,
)
from quant_core.optimize.rules.inner_softmax import inner_softmax
from quant_core.optimize.rules.merge_convs import merge_parallel_convs, merge_successive_convs
from quant_core.optimize.rules.plain_softmax import plain_softmax
from quant_core.optimize.rules.prelu import prelu_as_convs, prelu_as_leaky_relu
from quant_core.optimize.rules.split_convs import split_convs
from quant_core.optimize.rules.wide_kernels import wide_kernels


@dataclass(frozen=True, slots=True)
class Rule:
    """How a model is changed, and whether the change must be measured."""

    apply: Callable[[ir.Model, Facts], list[Applied]]
    timed: bool = False


RULES: dict[str, Rule] = {
    "fold_into_producer": Rule(fold_into_producer),
    "fold_into_consumers": Rule(fold_into_consumers),
    "merge_affine": Rule(merge_affine),
    "merge_parallel_convs": Rule(merge_parallel_convs),
    "merge_successive_convs": Rule(merge_successive_convs),
    "affine_as_conv": Rule(affine_as_conv, timed=True),
    "wide_kernels": Rule(wide_kernels, timed=True),
    "plain_softmax": Rule(plain_softmax),
    "prelu_as_leaky_relu": Rule(prelu_as_leaky_relu),
    "prelu_as_convs": Rule(prelu_as_convs, timed=True),
    "inner_softmax": Rule(inner_softmax, timed=True),
    "split_convs": Rule(split_convs, timed=True),
}
