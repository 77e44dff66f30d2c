"""What is wrong with a command line, as an error of ours that names the option or the file."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from flows.console.flags import flag
from quant_core.errors import QuantError, RequestError, reason_of

# The class of typer's errors of usage: its other names differ between versions of typer.
UsageError: Any = typer.BadParameter.__base__


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


def as_quant_error(problem: QuantError | OSError) -> QuantError:
    """What the system refuses, such as a name that is too long, as an error of ours."""
    if isinstance(problem, QuantError):
        return problem
    if os.environ.get("QUANTMILL_DEBUG"):
        raise problem
    hint = "The system says so; QUANTMILL_DEBUG=1 shows where"
    return QuantError(reason_of(problem), str(problem.filename or ""), hint)


def option_at(error: QuantError, typed: Mapping[str, Any]) -> str:
    """The option that an error is about, as it is typed: `--fix-shape n` for `fix_shape.n`; "" if
    it is about something else, as a file that is called like an option.
    """
    name, _, key = error.where.partition(".")
    is_option = name in typed and (not key or isinstance(typed[name], list))
    if not is_option or error.where in files_of(typed):
        return ""
    return f"{flag(name)} {key}".rstrip()


def is_no_file(place: str, typed: Mapping[str, Any]) -> bool:
    """Whether an error is about a path that was typed and is not there, or is a folder: then the
    request is wrong, and not the file.
    """
    return place in files_of(typed) and (not os.path.lexists(place) or Path(place).is_dir())


def files_of(typed: Mapping[str, Any]) -> set[str]:
    """The paths that were typed."""
    lists = (value if isinstance(value, list) else [value] for value in typed.values())
    paths = (value for value in itertools.chain(*lists) if isinstance(value, Path))
    return {*map(str, paths), str(typed.get("data"))}
