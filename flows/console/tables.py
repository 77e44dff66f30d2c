"""What views are made of: tables, verdicts and sentences of errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from quant_core.text import printable

# A problem that begins with one of these says it of the place where it is: "--bits is 3, not ...".
PREDICATES = (
    *("alone", "cannot", "crashed", "do", "does", "ended", "exists", "failed", "gives", "has"),
    *("holds", "is", "lacks", "lies", "matches", "means", "names", "needs"),
    *("returned", "takes", "took", "unpacks", "was"),
)

MAX_WHOLE = 20  # columns of a terminal up to which a cell is not folded while all fit
GAP = 2  # spaces that each column of a table has beside it

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


@dataclass(frozen=True, slots=True)
class FittingTable:
    """A table that keeps its numbers whole in any terminal: where its columns do not fit beside
    each other, the optional ones are left out, then the texts are folded.

    headings  of the columns, first to last
    lines     the cells of each row
    right     headings of columns that are aligned to the right
    optional  headings of columns that a narrow terminal does without, the most dispensable first
    """

    headings: Sequence[str]
    lines: Sequence[Sequence[Text]]
    title: str | None
    right: Sequence[str]
    optional: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = {heading: self._width(place) for place, heading in enumerate(self.headings)}
        needed = {heading: min(width, MAX_WHOLE) + GAP for heading, width in widths.items()}
        for heading in self.optional:
            if sum(needed.values()) > options.max_width:
                needed.pop(heading, None)
        fits = sum(needed.values()) <= options.max_width
        table = Table(
            box=SIMPLE_HEAD,
            title=self.title,
            title_justify="left",
            pad_edge=False,
            collapse_padding=True,
        )
        for heading in needed:
            justify: Literal["left", "right"] = "right" if heading in self.right else "left"
            is_whole = fits and widths[heading] <= MAX_WHOLE
            table.add_column(heading, justify=justify, overflow="fold", no_wrap=is_whole)
        for line in self.lines:
            cells = zip(self.headings, line, strict=True)
            table.add_row(*(cell for heading, cell in cells if heading in needed))
        yield table

    def _width(self, place: int) -> int:
        """The columns of a terminal that a column of the table takes without being folded."""
        texts = [Text(self.headings[place]), *(line[place] for line in self.lines)]
        return max(text.cell_len for text in texts)


def rows_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Mapping[str, str] | Sequence[str],
    title: str | None = None,
    right: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> FittingTable:
    """A table with the cells `columns` of each row. A column without any value is left out.

    columns  the row's key -> the heading, or keys that are headings
    """
    headings = columns if isinstance(columns, Mapping) else {key: key for key in columns}
    cells = [{key: _cell(row.get(key)) for key in headings} for row in rows]
    filled = [key for key in headings if any(cell[key].plain for cell in cells)]
    lines = [[cell[key] for key in filled] for cell in cells]
    return FittingTable([headings[key] for key in filled], lines, title, right, optional)


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
    """The stage in which a model failed, what is wrong, and where, if that is not the stage."""
    place = None if where == f"stage {stage}" else where
    return f"{stage}: {error_sentence(problem, place)}"


def verdict_text(word: str, reason: str | None) -> Text:
    """A verdict or an outcome in its colour, and why."""
    text = Text(word.replace("_", " "), style=VERDICT_STYLES.get(word, ""))
    return text.append(f": {printable(reason)}", style="default") if reason else text


def _cell(value: object) -> Text:
    return value if isinstance(value, Text) else Text("" if value is None else printable(value))
