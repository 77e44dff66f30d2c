"""Sequences, maps and absent values in feeds: arrays of objects, so that each value is an array.

A sequence of tensors is an array (items,) of arrays; a map is an array () that holds a dict, and an
absent optional is one that holds None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

OBJECT = np.dtype(object)
OPTIONAL = "optional("  # begins onnxruntime's name of a type whose value may be absent
DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


def required_type(kind: str) -> str:
    """The type of what an optional holds where it holds anything; of others `kind`."""
    return kind[len(OPTIONAL) : -1] if kind.startswith(OPTIONAL) else kind


def element_type(kind: str) -> str:
    """The type of the tensors in a sequence or optional, or of a map's values; of others `kind`.

    Source: onnxruntime's names of types, such as `seq(tensor(float))`.
    """
    while kind.startswith(("seq(", OPTIONAL, "map(")):
        inner = kind[kind.index("(") + 1 : -1]
        kind = inner.split(",", 1)[1] if kind.startswith("map(") else inner
    return kind


def boxed(value: Any) -> np.ndarray:
    """A list, tuple or mapping as such an array; arrays stay as they are."""
    if isinstance(value, Mapping):
        box = np.empty((), OBJECT)
        box[()] = dict(value)
        return box
    if not isinstance(value, (list, tuple)):
        return np.asarray(value)
    box = np.empty(len(value), OBJECT)
    for position, item in enumerate(value):
        box[position] = np.asarray(item)
    return box


def unboxed(array: np.ndarray) -> Any:
    """What onnxruntime takes: of an array of objects the list or the dict, tensors as they are."""
    if getattr(array, "dtype", None) != OBJECT:
        return array
    return list(array) if array.ndim else array.item()


def is_absent(value: Any) -> bool:
    """Whether the value is None, or the array that holds None."""
    if not isinstance(value, np.ndarray):
        return value is None
    return value.dtype == OBJECT and not value.ndim and value.item() is None


def numbers_of(value: Any) -> np.ndarray:
    """The numbers of a value: of a sequence a row for each item if all have the same shape, else
    one after another; tensors as they are.
    """
    if value is None:
        return np.zeros(0)
    if isinstance(value, Mapping):
        return np.array(list(value.values()))
    if isinstance(value, np.ndarray) and value.dtype == OBJECT and not value.ndim:
        return numbers_of(value.item())
    if not isinstance(value, list) and getattr(value, "dtype", None) != OBJECT:
        return np.asarray(value)
    items = [numbers_of(item) for item in value]
    are_alike = len({item.shape for item in items}) == 1
    return np.stack(items) if are_alike else np.concatenate([[], *map(np.ravel, items)])
