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
import itertools
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from flows.cli.groups import GROUPS
from flows.cli.option import was_typed
from flows.cli.options import FORMAT
from flows.console import printing
from flows.console.flags import flag
from quant_core.errors import QuantError, RequestError, reason_of

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


# Its other names differ between versions of typer, which brings its own parser since 0.26.
UsageError: Any = typer.BadParameter.__base__

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
        error = _as_quant_error(caught)
        option = _option_at(error, typed)
        error.where = option or error.where or where
        printing.print_error(error, as_json)
        is_wrong_request = bool(option) or _is_no_file(error.where, typed)
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


def _as_quant_error(problem: QuantError | OSError) -> QuantError:
    """What the system refuses, such as a name that is too long, as an error of ours."""
    if isinstance(problem, QuantError):
        return problem
    if os.environ.get("QUANTMILL_DEBUG"):
        raise problem
    hint = "The system says so; QUANTMILL_DEBUG=1 shows where"
    return QuantError(reason_of(problem), str(problem.filename or ""), hint)


def _option_at(error: QuantError, typed: Mapping[str, Any]) -> str:
    """The option that an error is about, as it is typed: `--fix-shape n` for `fix_shape.n`; "" if
    it is about something else, as a file that is called like an option.
    """
    name, _, key = error.where.partition(".")
    is_option = name in typed and (not key or isinstance(typed[name], list))
    if not is_option or error.where in _files(typed):
        return ""
    return f"{flag(name)} {key}".rstrip()


def _is_no_file(place: str, typed: Mapping[str, Any]) -> bool:
    """Whether an error is about a path that was typed and is not there, or is a folder: then the
    request is wrong, and not the file.
    """
    return place in _files(typed) and (not os.path.lexists(place) or Path(place).is_dir())


def _files(typed: Mapping[str, Any]) -> set[str]:
    """The paths that were typed."""
    lists = (value if isinstance(value, list) else [value] for value in typed.values())
    paths = (value for value in itertools.chain(*lists) if isinstance(value, Path))
    return {*map(str, paths), str(typed.get("data"))}


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
    if any(output.samefile(file) for file in map(Path, _files(read)) if file.exists()):
        problem = "the output is also an input, which is never changed"
        raise RequestError(problem, str(output), "Choose another output")


def usage_error(error: UsageError) -> RequestError:
    """What typer says of a command line that it cannot read, as an error of ours."""
    command = error.ctx.command_path if error.ctx else "quantmill"
    if near := getattr(error, "possibilities", None):
        return RequestError(
            f"there is no option {error.option_name}", "", f"Did you mean {near[0]}?"
        )
    problem, _, hint = error.format_message().rstrip(".").partition(". ")
    if extra := re.match(r"Got unexpected extra argument\(s\) \((\S+)\)", problem):
        problem = f"{extra[1]} is one argument too many"
        if error.ctx and any(param.name == "output" for param in error.ctx.command.params):
            hint = "An output is named with -o"
    elif wrong := re.match(r"Invalid value for '([^']+)': (?:Input |Value error, )?(.*)", problem):
        # "--threads should be a valid integer, unable to parse string as an integer"
        problem = f"{wrong[1]} {wrong[2]}".partition(", unable")[0]
    else:
        problem = problem[:1].lower() + problem[1:]
    return RequestError(problem, "", hint or f"`{command} --help` lists what can be given")


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
