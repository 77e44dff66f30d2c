"""How an array becomes what an input of a model takes, or why it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from quant_core.data.input_hints import takes_missing
from quant_core.data.input_spec import InputSpec
from quant_core.errors import DataError
from quant_core.model import files
from quant_core.model.containers import DTYPES, OBJECT, boxed, element_type, is_absent
from quant_core.text import counted


def fit(
    array: np.ndarray | None, spec: InputSpec, where: str, model: Path | None = None
) -> np.ndarray:
    """The array as the model takes it, C-ordered and in the machine's byte order.

    array  None where an optional input gets no value
    model  the file whose graph tells whether a value may be NaN, as missing ones are

    Raises: DataError about `where` if its shape or dtype does not fit, or a value is not finite and
    means nothing to the model.
    """
    where = f"{where}, {spec.name}"
    if spec.is_optional and is_absent(array):
        return boxed(None)
    if spec.container:
        return _fit_container(array, spec, where)
    array = np.asarray(array)
    has_rank = array.ndim == len(spec.shape)
    if spec.shape and not (has_rank and fits_shape(array.shape, spec.shape)):
        inner = spec.shape[1:]
        lacks_first = array.ndim == len(inner) and fits_shape(array.shape, inner)
        hint = f"The model takes {spec}{', with its first axis' if lacks_first else ''}"
        raise DataError(f"has shape {array.shape}", where, hint)
    array = _cast(array, spec, where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        if _masks(array, spec) or (model is not None and _lacks(array, spec, model)):
            return array
        bad = np.argwhere(~np.isfinite(array))
        first = tuple(map(int, bad[0]))
        raise DataError(
            f"holds {counted(len(bad), 'NaN or infinite value')} as {array.dtype}, "
            f"the first ({array[first]}) at {first}",
            where,
            "Repair or drop this sample",
        )
    return array


def _fit_container(value: Any, spec: InputSpec, where: str) -> np.ndarray:
    """A list of tensors, or a mapping, as the model takes it."""
    box = boxed(value)
    wants_map = "map(" in spec.container
    if box.dtype != OBJECT or wants_map == bool(box.ndim):
        hint = "A mapping of keys to numbers" if wants_map else "A list of arrays"
        raise DataError(f"is {type(value).__name__}", where, f"The model takes {spec}: {hint}")
    if wants_map:
        return box
    item = replace(spec, container="", dtype=np.dtype(DTYPES[element_type(spec.container)]))
    fitted = np.empty(len(box), OBJECT)
    for position, array in enumerate(box):
        fitted[position] = fit(array, item, f"{where}[{position}]")
    return fitted


def fits_shape(sizes: Sequence[int | str | None], shape: Sequence[int | str | None]) -> bool:
    """Whether every axis that the shape fixes has that size."""
    pairs = zip(sizes, shape, strict=False)
    return all(not isinstance(fixed, int) or size == fixed for size, fixed in pairs)


def _masks(array: np.ndarray, spec: InputSpec) -> bool:
    """Whether -inf, which Softmax makes 0, hides positions: others are 0, or the name says it."""
    shown = array[array != -np.inf]
    is_bias = any(word in spec.name.lower() for word in ("mask", "bias"))
    return bool(np.isfinite(shown).all() and (is_bias or not shown.any()))


def _lacks(array: np.ndarray, spec: InputSpec, model: Path) -> bool:
    """Whether values are missing, for which the model has a rule."""
    is_missing = not np.isinf(array).any()
    modified_ns = model.stat().st_mtime_ns if model.is_file() else 0
    return is_missing and _may_lack(model, modified_ns, spec.name)


@lru_cache
def _may_lack(model: Path, modified_ns: int, name: str) -> bool:
    """Whether the file, as it was at that time, has a rule for missing values of this input: every
    sample asks again.
    """
    return takes_missing(files.load(model), name)


def _cast(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array in the model's dtype. Raises: DataError if the dtype cannot hold its values."""
    got, wanted = array.dtype.kind, spec.dtype.kind
    if wanted == "U" == got:
        return array
    if wanted == "U" and got == "O" and all(isinstance(text, str) for text in array.flat):
        return array.astype(str)  # onnxruntime gives and takes strings as objects
    if got in "biuf" and wanted in "biuf" and (got != "f" or wanted == "f"):
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(array, spec.dtype).reshape(array.shape)
        if got == wanted == "f" or np.can_cast(array.dtype, spec.dtype, "safe"):
            return cast
        changed = array != cast
        if not changed.any():
            return cast
        value = array[changed].flat[0]
        raise DataError(
            f"holds {value}, which {spec.dtype} cannot", where, f"The model takes {spec}"
        )
    raise DataError(f"is {array.dtype}", where, f"The model takes {spec}")
