"""What rules did: one row for each place of the graph that was changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from quant_core.config import known_keys

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


def former_names(changes: Iterable[Applied]) -> dict[str, list[str]]:
    """For each node that stands in for others, the names of these, in the order of the changes."""
    found: dict[str, list[str]] = {}
    for change in changes:
        for name in change.absorbed:
            if name != change.node:
                carried = found.pop(name, [])
                found.setdefault(change.node, []).extend([name, *carried])
    return found
