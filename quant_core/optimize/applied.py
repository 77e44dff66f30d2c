"""What rules did: one row for each place of the graph that was changed."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from quant_core.errors import ModelError
from quant_core.fields import known_keys
from quant_core.model import files

REWRITES = "quantmill.rewrites"  # key in the metadata of a model that was made of a rewritten one
MOST_BYTES = 1 << 24  # of that list, which a stranger's file may inflate

Chosen: TypeAlias = Callable[[str], bool]  # whether a rule may change the node of this name


@dataclass(frozen=True, slots=True)
class Applied:
    """One change.

    rule      its name in the tables of rules
    node      the node that now computes what the others did, by name
    absorbed  names of the nodes that are gone
    """

    rule: str
    node: str
    absorbed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the change back."""
        return asdict(self) | {"absorbed": list(self.absorbed)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Applied:
        """Raises: RequestError for an unknown key, TypeError for a missing one."""
        return cls(**known_keys(cls, values))


def to_text(changes: Iterable[Applied]) -> str:
    """The changes as short text for the metadata of a model, "" for none; `from_text` reads it."""
    rows = [[change.rule, change.node, *change.absorbed] for change in changes]
    return base64.b85encode(zlib.compress(json.dumps(rows).encode(), 9)).decode() if rows else ""


def from_text(text: str) -> tuple[Applied, ...]:
    """The changes that `to_text` wrote. Raises: ModelError if the text is something else."""
    if not text:
        return ()
    try:
        rows = json.loads(zlib.decompressobj().decompress(base64.b85decode(text), MOST_BYTES))
        return tuple(Applied(rule, node, tuple(absorbed)) for rule, node, *absorbed in rows)
    except (ValueError, TypeError, zlib.error) as error:
        raise ModelError("the list of rewrites cannot be read", REWRITES) from error


def rewrites_in(path: Path) -> dict[str, int]:
    """Rule -> how many places it changed in the float model that the file was made of; the most
    first. Raises: ModelError if the file, or its list of rewrites, cannot be read.
    """
    rows = from_text(files.load(path).metadata_props.get(REWRITES, ""))
    return dict(Counter(row.rule for row in rows).most_common())


def rules_of(changes: Iterable[Applied]) -> dict[str, list[str]]:
    """Rewritten node -> the rules that did it, each once, in their order."""
    found: dict[str, dict[str, None]] = {}
    for change in changes:
        absorbed = [rule for name in change.absorbed for rule in found.pop(name, {})]
        found.setdefault(change.node, {}).update(dict.fromkeys([*absorbed, change.rule]))
    return {node: list(rules) for node, rules in found.items()}


def former_names(changes: Iterable[Applied]) -> dict[str, list[str]]:
    """Node that stands in for others -> the names of these, in the order of the changes."""
    found: dict[str, list[str]] = {}
    for change in changes:
        for name in change.absorbed:
            if name != change.node:
                carried = found.pop(name, [])
                found.setdefault(change.node, []).extend([name, *carried])
    return found
