"""How values from outside become fields of a dataclass: known keys, allowed values, right types."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_type_hints

from quant_core.errors import RequestError, nearest_hint

# Type of a field -> what it is called for people.
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "absent",
    tuple[str, ...]: "a list of texts",
    Mapping[str, int]: "a mapping of names to whole numbers",
}


def known_keys(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with lists as tuples.

    Raises: RequestError for a key that is no field of `cls`, with the nearest field that is.
    """
    if not isinstance(values, Mapping):
        raise RequestError(f"is {values!r}", cls.__name__, "A mapping of keys to values")
    names = [f.name for f in fields(cls)]
    for key in values:
        if key not in names:
            hint = nearest_hint(str(key), names) or f"Known: {', '.join(names)}"
            raise RequestError("unknown key", str(key), hint)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def one_of(key: str, value: object, allowed: tuple[object, ...], more: str = "") -> None:
    """Raises: RequestError unless `value` is one of `allowed`."""
    if value not in allowed or isinstance(value, bool):
        choices = f"{', '.join(map(str, allowed))}{more}"
        hint = nearest_hint(str(value), map(str, allowed)) or "Choose one of these"
        raise RequestError(f"is {value!r}, not one of {choices}", key, hint)


def check_fields(value: Any) -> None:
    """Raises: RequestError where a field of the dataclass `value` has not its annotated type."""
    for name, options in field_types(type(value)).items():
        got = getattr(value, name)
        if not any(_is_a(got, option) for option in options):
            hint = f"Must be {' or '.join(KINDS[option] for option in options)}"
            raise RequestError(f"is {got!r}", name, hint)


def field_types(kind: type) -> Mapping[str, tuple[Any, ...]]:
    """Field of the dataclass -> the types that its values may have."""
    # mypy doubts that a class of rows is hashable, as `cache` wants it
    return _field_types(kind)


@cache
def _field_types(kind: Any) -> Mapping[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    return {field.name: _alternatives(hints[field.name]) for field in fields(kind)}


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _is_a(got: object, kind: Any) -> bool:
    if kind is float:
        return isinstance(got, (int, float)) and not isinstance(got, bool)
    if kind is int:
        return isinstance(got, int) and not isinstance(got, bool)
    if args := get_args(kind):
        origin = kind.__origin__
        if not isinstance(got, origin):
            return False
        if isinstance(got, Mapping):
            return all(_is_a(k, args[0]) and _is_a(v, args[1]) for k, v in got.items())
        return all(_is_a(item, args[0]) for item in got)
    return isinstance(got, kind)
