"""The inputs that a model must be fed, as onnxruntime knows them, and with pinned sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.data.fit import fits_shape
from quant_core.data.input_spec import InputSpec, did_you_mean
from quant_core.errors import DataError, ModelError
from quant_core.model.containers import DTYPES, OBJECT, OPTIONAL, element_type, required_type
from quant_core.model.fix_shape import fixed_shapes
from quant_core.model.session import Model, open_session
from quant_core.text import counted


def input_specs(
    model: Model | ort.InferenceSession, *others: Model | ort.InferenceSession
) -> list[InputSpec]:
    """The inputs that a model must be fed, with the sizes that others made of it fix.

    Raises: ModelError if it does not load, or has an input that holds no numbers of a numpy type.
    """
    session = model
    if not isinstance(session, ort.InferenceSession):
        session = open_session(session, optimize=False)
    specs = []
    for node in session.get_inputs():
        kind = element_type(node.type)
        if kind not in DTYPES:
            raise ModelError(
                f"takes {node.type}", node.name, "quantmill feeds tensors of numpy's types"
            )
        held, is_optional = required_type(node.type), node.type.startswith(OPTIONAL)
        if held != kind:
            specs.append(InputSpec(node.name, OBJECT, (), held, is_optional))
            continue
        shape = tuple(None if size in ("", -1) else size for size in node.shape)
        specs.append(InputSpec(node.name, np.dtype(DTYPES[kind]), shape, is_optional=is_optional))
    for narrower in map(input_specs, others):
        specs = [_narrowed(spec, narrower) for spec in specs]
    return specs


def fixed_specs(inputs: Sequence[InputSpec], sizes: Mapping[str, int]) -> list[InputSpec]:
    """The inputs with these open sizes fixed (model/fix_shape.py). Raises: RequestError."""
    shapes = fixed_shapes({spec.name: spec.shape for spec in inputs}, sizes)
    return [replace(spec, shape=shapes[spec.name]) for spec in inputs]


def sizes_of(inputs: Sequence[InputSpec]) -> dict[str, int]:
    """INPUT:AXIS -> size, of all sizes that are fixed, as `fixed_specs` takes them."""
    return {
        f"{spec.name}:{axis}": size
        for spec in inputs
        for axis, size in enumerate(spec.shape)
        if isinstance(size, int)
    }


def _narrowed(spec: InputSpec, others: Sequence[InputSpec]) -> InputSpec:
    """The input with the sizes that the same input of another model fixes."""
    other = next((o for o in others if o.name == spec.name), spec)
    if len(other.shape) != len(spec.shape):
        return spec
    pairs = zip(spec.shape, other.shape, strict=True)
    return replace(spec, shape=tuple(a if isinstance(a, int) else b for a, b in pairs))


def pinned_specs(inputs: Sequence[InputSpec], shape: Any) -> tuple[InputSpec, ...]:
    """The inputs with the axes that `shape` names fixed."""
    if shape is None:
        return tuple(inputs)
    if not isinstance(shape, Mapping):
        if len(inputs) != 1:
            raise DataError(
                f"is {shape!r}, but the model has {counted(len(inputs), 'input')}",
                "shape",
                "{input: sizes, ...}",
            )
        shape = {inputs[0].name: shape}
    for name in shape:
        if name not in [spec.name for spec in inputs]:
            raise DataError(f"{name!r} is no input", "shape", did_you_mean(name, inputs))
    return tuple(_pin(spec, shape[spec.name]) if spec.name in shape else spec for spec in inputs)


def _pin(spec: InputSpec, sizes: Sequence[int]) -> InputSpec:
    """The input with these sizes; without the first of them, the batch axis stays open."""
    missing = len(spec.shape) - len(sizes)
    wanted = [*spec.shape[:missing], *sizes]
    fits = fits_shape(wanted, spec.shape)
    if spec.shape and (missing not in (0, 1) or not fits):
        raise DataError(f"is {list(sizes)}", f"shape.{spec.name}", f"The model takes {spec}")
    return replace(spec, shape=tuple(wanted))
