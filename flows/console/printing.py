"""Prints answers and errors: an answer as tables or JSON, an error as a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import progress as rich_progress
from rich.console import Console, RenderableType
from rich.text import Text

from flows.console.result import Result
from flows.console.tables import error_text
from quant_core.deadline import Progress, silent
from quant_core.errors import QuantError
from quant_core.text import plain, printable

PIPE_WIDTH = 200  # of text that goes to no terminal, so that long names are not wrapped


def print_answer(data: Any, view: Callable[[Any], RenderableType] | None) -> None:
    """Print `data` as `view` draws it, and what it holds of these: the HTML page that was written,
    and the command that is of use next. Without a view, print it as JSON.
    """
    if view is not None:
        console().print(view(data))
        for key in ("page", "next"):
            if isinstance(data, Mapping) and data.get(key):
                line = Text(f"{key}: {printable(data[key])}", style="dim")
                console().print(line, soft_wrap=True)
    else:
        sys.stdout.write(json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def print_error(error: QuantError, as_json: bool) -> None:
    """Print problem, where and hint: to stderr for a person, or to stdout as a JSON line."""
    if as_json:
        # on one line: it may end a stream of events
        sys.stdout.write(json.dumps({"error": error.to_dict()}) + "\n")
        return
    console(stderr=True).print(error_text(error.problem, error.where, error.hint), soft_wrap=True)


def print_result(
    result: Result, table: Callable[[Sequence[Mapping[str, Any]]], RenderableType], as_json: bool
) -> None:
    """Print how a batch or an audit ended: its table and counts, or one JSON line."""
    if as_json:
        sys.stdout.write(json.dumps({"event": "finished", **result.to_dict()}) + "\n")
        return
    console().print(table([row.to_json() for row in result.rows]))
    page, reports = result.page, printable(str(result.reports))
    following = f"reports in {reports}" if page is None else f"open {printable(str(page))}"
    # The last line counts: people and scripts look there.
    console().print(f"{result.message} in {result.seconds:.1f} s; {following}", markup=False)


@contextmanager
def progress_status(quiet: bool) -> Iterator[Progress]:
    """A function that shows what is being done if stderr is a terminal, and the seconds that are
    left of it, or else those that it has taken.
    """
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}", markup=False),
        _SecondsColumn(),
    )
    with rich_progress.Progress(*columns, console=console(stderr=True), transient=True) as shown:
        task = shown.add_task("reading the model", total=None)

        def show(doing: str, seconds: float | None = None, /) -> None:
            shown.reset(task, description=printable(doing), total=seconds)

        yield show


class _SecondsColumn(rich_progress.ProgressColumn):
    """The seconds that a task has left of its total, or has taken if it has none."""

    def render(self, task: rich_progress.Task) -> Text:
        elapsed = task.elapsed or 0.0
        if task.total is None:
            return Text(f"{elapsed:.0f} s", "cyan")
        return Text(f"{max(0.0, task.total - elapsed):.0f} s left", "cyan")


def console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; PIPE_WIDTH if there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)
