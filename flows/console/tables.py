"""What views are made of: tables, verdicts and sentences of errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from quant_core.text import printable

# A problem that begins with one of these says it of the place where it is: "--bits is 3, not ...".
PREDICATES = (
    *("alone", "cannot", "crashed", "ended", "failed", "gives", "has", "holds", "is", "lies"),
    *("matches", "means", "names", "needs", "promises", "returned", "was"),
)


VERDICT_STYLES = {
    "met": "green",
    "kept": "green",
    "regressed": "bold red",
    "stale": "yellow",
    "inconclusive": "yellow",
    "not_met": "yellow",
    "failed": "bold red",
    "skipped": "dim",
}


def facts_table(facts: Mapping[str, object]) -> Table:
    """Two columns, key and value; a fact that is None or empty is left out."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, ""):
            table.add_row(_cell(key), _cell(value))
    return table


def rows_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str],
    title: str | None = None,
    right: Sequence[str] = (),
) -> Table:
    """A table with the cells `columns` of each row. A column without any value is left out.

    columns  the row's key -> the heading
    right    headings of columns that are aligned to the right
    """
    cells = [{key: _cell(row.get(key)) for key in columns} for row in rows]
    filled = [key for key in columns if any(cell[key].plain for cell in cells)]
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for key in filled:
        justify: Literal["left", "right"] = "right" if columns[key] in right else "left"
        table.add_column(columns[key], justify=justify, overflow="fold")
    for cell in cells:
        table.add_row(*(cell[key] for key in filled))
    return table


def error_text(problem: str, where: str, hint: str) -> Text:
    """A sentence, one more line for each further mistake of a manifest, and the hint."""
    lines = Text()
    for label, text in (("error", error_sentence(problem, where)), ("hint", hint)):
        if text:
            lines.append(f"{label}: ", style="bold red" if label == "error" else "bold")
            lines.append("\n".join(map(printable, text.splitlines())) + "\n")
    lines.rstrip()
    return lines


def error_sentence(problem: str, where: str | None) -> str:
    """What is wrong and where, as one sentence."""
    if not where:
        return problem
    says_it_of_the_place = problem.split(" ", 1)[0] in PREDICATES
    return f"{where} {problem}" if says_it_of_the_place else f"{where}: {problem}"


def failure_sentence(stage: str, problem: str, where: str | None) -> str:
    """In which stage a model failed, what is wrong, and where, if that is not just the stage."""
    place = None if where == f"stage {stage}" else where
    return f"{stage}: {error_sentence(problem, place)}"


def verdict_text(word: str, reason: str | None = None) -> Text:
    """A verdict or an outcome in its colour, and why."""
    text = Text(word.replace("_", " "), style=VERDICT_STYLES.get(word, ""))
    return text.append(f": {printable(reason)}", style="default") if reason else text


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text("" if value is None else printable(value))
