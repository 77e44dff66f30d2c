"""What is wrong in a manifest: a place, a problem and a hint."""

from __future__ import annotations

from dataclasses import dataclass

Place = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong at one place of the manifest, and a hint what would be right."""

    place: Place
    problem: str
    hint: str

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{format_place(self.place)}: {self.problem}{hint}"


def format_place(place: Place) -> str:
    """A place as text, for example `models[2].contract.metric`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).lstrip(".")
