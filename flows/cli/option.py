"""How an option is shown and read by typer, and how a group of options builds one value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from flows.console.flags import flags_of


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as typer shows and reads it.

    default  what the help shows as the default; None: nothing
    choices  what the shell completes the value to
    kind     type of the value; a list may be typed repeatedly
    """

    help: str
    metavar: str | None = None
    default: object = None
    choices: Iterable[str] = ()
    kind: Any = str

    def parameter(
        self, name: str, default: object = None, panel: str | None = None
    ) -> inspect.Parameter:
        """The parameter of a function in which typer finds this option."""

        def complete(incomplete: str) -> list[str]:
            return [choice for choice in self.choices if choice.startswith(incomplete)]

        info = typer.Option(
            "/".join(flags_of(name)),
            help=self.help if self.default is None else f"{self.help}. Default: {self.default}",
            metavar=self.metavar,
            show_default=False,
            rich_help_panel=panel,
            autocompletion=complete if self.choices else None,
        )
        kind = self.kind if default is not None else self.kind | None
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, info],
        )


@dataclass(frozen=True, slots=True)
class Group:
    """Options that build one value together.

    panel  heading of these options in the help
    build  makes the value of the options that were typed; it raises RequestError
    """

    panel: str
    options: Mapping[str, Option]
    build: Callable[[Mapping[str, Any]], Any]

    def parameters(self) -> list[inspect.Parameter]:
        return [option.parameter(name, panel=self.panel) for name, option in self.options.items()]

    def take(self, arguments: dict[str, Any]) -> Any:
        """Remove this group's options from `arguments` and build its value of them."""
        values = {name: arguments.pop(name) for name in self.options}
        return self.build({name: value for name, value in values.items() if was_typed(value)})


def was_typed(value: object) -> bool:
    """Whether the value of an option without a default was typed."""
    return value not in (None, [], ())
