"""The text of a manifest, read safely: a hostile file costs neither time nor memory."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from quant_core.errors import RequestError, reason_of

SUFFIXES = (".yaml", ".yml", ".json", ".toml")  # of manifests, as opposed to models
MAX_BYTES = 8 << 20
MAX_VALUES = 1_000_000
# A TOML key with more than 16 parts, quoted or not: see `_read_toml`.
LONG_KEY = re.compile(r"""(?:\.[ \t]*+(?:"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+'|[\w-]++)[ \t]*+){16}""")


def read_values(path: Path) -> object:
    """The plain values in that file, which is TOML if its name ends in .toml, else YAML (JSON is).

    Raises: RequestError if it cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # a device or a pipe has no size to look at
        if len(content) > MAX_BYTES:
            raise RequestError(
                "is larger than 8 MB", str(path), "Use the batch form with a folder of models"
            )
        return _parse(content.decode("utf-8"), path)
    except OSError as error:
        problem = f"cannot be read: {reason_of(error)}"
        raise RequestError(problem, str(path), "Name a YAML or TOML manifest") from None
    except UnicodeDecodeError:
        raise RequestError("is not UTF-8 text", str(path), "Name a YAML or TOML manifest") from None


def _parse(text: str, path: Path) -> object:
    kind = "TOML" if path.suffix.lower() == ".toml" else "YAML"
    try:
        values = _read_toml(text) if kind == "TOML" else yaml.load(text, _UniqueKeyLoader)
        _check_scalars(values)
        return values
    except RecursionError:
        raise RequestError(f"is not {kind}: nested too deep", str(path), "") from None
    except Exception as error:  # PyYAML's constructors raise anything for a malformed value
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise RequestError(f"is not {kind}: {problem}", f"{path}{line}", "") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML, in which no key may be given twice: YAML itself would silently drop the first.

    Aliases must not expand to more than MAX_VALUES values: a kilobyte of aliases to aliases can
    stand for billions.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"its aliases unfold to more than {MAX_VALUES:,} values")
        return node


def _count_values(node: yaml.Node, counts: dict[int, float]) -> float:
    """How many values the node has when all aliases are expanded; infinite if it holds itself.

    counts  the nodes that are counted already, by id
    """
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = math.inf  # what a node finds here inside itself
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> Iterator[dict[Any, Any]]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value != "<<" and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
    return loader.construct_yaml_map(node)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


def _read_toml(text: str) -> object:
    """Raises: ValueError."""
    # tomllib takes memory and time that grow with the square of a key's parts.
    if LONG_KEY.search(text):
        raise ValueError("a key has more than 16 parts")
    return tomllib.loads(text)


def _check_scalars(values: object) -> None:
    """Refuse what JSON cannot hold.

    Raises: ValueError for a number of more than 64 bits, or for text that is not Unicode.
    """
    if isinstance(values, dict):
        for pair in values.items():
            _check_scalars(pair)
    elif isinstance(values, (list, tuple, set)):
        for value in values:
            _check_scalars(value)
    elif isinstance(values, str):
        values.encode()
    elif isinstance(values, int) and values.bit_length() > 63:
        raise ValueError("a number has more than 64 bits")
