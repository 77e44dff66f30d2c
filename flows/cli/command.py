"""How a function becomes a command: its parameters become options, and its answer is printed.

    parameter of the function   on the command line         what the function gets
    named in GROUPS             the options of that group   the value that the group builds of them
    `progress`                  nothing                     a function that shows what is being done
    `as_json`                   nothing                     whether --format is json
    `typed_options`             nothing                     names of the options that were typed
    any other                   what its annotation says    what was typed

Every command also has --format.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from flows.cli.errors import as_quant_error, files_of, is_no_file, option_at
from flows.cli.groups import GROUPS
from flows.cli.option import was_typed
from flows.cli.options import FORMAT
from flows.console import printing
from quant_core.errors import QuantError, RequestError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers: JSON values, the function that draws them, and the exit code."""

    data: Any
    view: Callable[[Any], RenderableType]
    exit_code: int = 0


class _PlainHelp:
    """Help that draws an argument as MODEL, not {MODEL} <path>, and no type beside a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = lambda ctx: ""  # type: ignore[method-assign]
        return parameters

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces: list[str] = super().collect_usage_pieces(ctx)  # type: ignore[misc]
        return [piece.replace("{", "").replace("}", "") for piece in pieces]


class CommandGroup(_PlainHelp, TyperGroup):
    """`quantmill`."""


class _Command(_PlainHelp, TyperCommand):
    """One of its commands."""


# A function that has printed its answer itself returns only the exit code.
Command = Callable[..., Answer | int]


def register(app: typer.Typer, function: Command) -> None:
    """Make the function a command of `app`; it stays as it is."""
    parameters = inspect.signature(function, eval_str=True).parameters
    app.command(function.__name__, cls=_Command)(_typer_function(function, parameters))


def _typer_function(
    function: Command, parameters: Mapping[str, inspect.Parameter]
) -> Callable[..., None]:
    """What typer calls. Typer reads the options from its signature, which is made here."""
    options = []
    for name, parameter in parameters.items():
        if name not in (*GROUPS, "progress", "as_json", "typed_options"):
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    for name in parameters:
        if name in GROUPS:
            options += GROUPS[name].parameters()
    options.append(FORMAT.parameter("format", default="text"))

    def run(**typed: Any) -> None:
        as_json = typed.pop("format") == "json"
        raise typer.Exit(_run(function, list(parameters), typed, as_json))

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    # where a line ends in the code says nothing of the help, which may be narrower
    run.__doc__ = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
    return run


def _run(function: Command, parameters: list[str], typed: dict[str, Any], as_json: bool) -> int:
    """Call the function, print its answer or its error, and return the exit code."""
    paths = (value for value in typed.values() if isinstance(value, Path))
    where = str(next(paths, ""))  # of an error that names no place
    try:
        answer = _call(function, parameters, typed, as_json)
    except (QuantError, OSError) as caught:
        error = as_quant_error(caught)
        option = option_at(error, typed)
        error.where = option or error.where or where
        printing.print_error(error, as_json)
        is_wrong_request = bool(option) or is_no_file(error.where, typed)
        return RequestError.exit_code if is_wrong_request else error.exit_code
    except Exception as error:
        if os.environ.get("QUANTMILL_DEBUG"):
            raise
        problem = f"unexpected {type(error).__name__}: {error}"
        hint = "Please report it; QUANTMILL_DEBUG=1 shows the traceback"
        printing.print_error(QuantError(problem, where, hint), as_json)
        return 1
    if isinstance(answer, int):
        return answer
    printing.print_answer(answer.data, None if as_json else answer.view)
    return answer.exit_code


def _check_output(typed: Mapping[str, Any]) -> None:
    """Raises: RequestError if what is to be written is one of the files that are read, or meant to
    be standard output.
    """
    output, read = typed.get("output"), {**typed, "output": None}
    if output == Path("-"):
        hint = "Name a file; --format json prints the answer"
        raise RequestError("is not taken for standard output", "-o -", hint)
    if output is None or not output.exists():
        return
    if any(output.samefile(file) for file in map(Path, files_of(read)) if file.exists()):
        problem = "the output is also an input, which is never changed"
        raise RequestError(problem, str(output), "Choose another output")


def _call(
    function: Command, parameters: list[str], typed: dict[str, Any], as_json: bool
) -> Answer | int:
    """Call the function with what was typed, each group's options replaced by the group's value."""
    _check_output(typed)
    arguments = dict(typed)
    if "typed_options" in parameters:
        arguments["typed_options"] = [name for name, value in typed.items() if was_typed(value)]
    for name in parameters:
        if name in GROUPS:
            arguments[name] = GROUPS[name].take(arguments)
    if "as_json" in parameters:
        arguments["as_json"] = as_json
    if "progress" not in parameters:
        return function(**arguments)
    with printing.progress_status(quiet=as_json) as progress:
        return function(**arguments, progress=progress)
