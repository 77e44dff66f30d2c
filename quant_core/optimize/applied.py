"""What a rule did: one row for each place of the graph that it changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Applied:
    """One change.

    rule      its name in RULES
    node      the node that now computes what the others did, by name
    absorbed  names of the nodes that are gone
    """

    rule: str
    node: str
    absorbed: tuple[str, ...]
