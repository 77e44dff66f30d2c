"""The parts of the documentation that are written from the code: a hook of mkdocs.

A line `<!-- generated: NAME -->` of a page is replaced by what `GENERATED[NAME]` returns.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # mkdocs loads this file from anywhere

import typer.main
from typer.core import TyperArgument

import quant_core
from flows.cli.commands import app
from flows.cli.groups import GROUPS
from flows.console.flags import flags_of
from flows.manifest.schema import SECTIONS
from quant_core.calibrate.ranges import RANGE_METHODS
from quant_core.config import Contract, QuantConfig
from quant_core.metrics import METRICS
from quant_core.optimize.rules import EXACT, TIMED
from quant_core.plan.operators import RULES
from quant_core.plan.targets import TARGETS
from tasks.rows import TABLES

COLUMN = re.compile(r"^    (\w+): ([^=#\n]+?)(?: = [^#\n]+?)?(?:  # (.*))?$", re.MULTILINE)
ENTRY = re.compile(r"^(\w+)  +(.+(?:\n {4,}.+)*)$", re.MULTILINE)  # of a docstring
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this with the text of every page."""
    return MARK.sub(lambda match: GENERATED[match[1]](), markdown)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return str("" if value is None else value).replace("|", "\\|").replace("\n", " ")


def _code(value: object) -> str:
    return f"`{value}`" if value not in (None, "") else ""


def _typed(parameter: Any) -> str:
    """An argument as the help names it, or an option as it is typed."""
    if isinstance(parameter, TyperArgument):
        return str(parameter.metavar)
    return " / ".join([*parameter.opts, *parameter.secondary_opts])


def _commands() -> str:
    """Every command with its help and its own options; groups of options stand below."""
    group = typer.main.get_command(app)
    shared = {name for options in GROUPS.values() for name in options.options}
    parts = []
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        own = [
            p for p in command.params if p.name not in shared and p.name not in ("help", "format")
        ]
        panels = dict.fromkeys(
            getattr(p, "rich_help_panel", None) for p in command.params if p.name in shared
        )
        rows = [(_code(_typed(p)), p.help or "") for p in own]
        parts.append(f"## {name}\n\n{inspect.cleandoc(command.help or '')}\n")
        if rows:
            parts.append(_table(("argument or option", "what it is"), rows) + "\n")
        if links := [f"[{p}](#{p.lower()}-options)" for p in panels if p]:
            parts.append(f"Options that others take as well: {', '.join(links)}.\n")
    return "\n".join(parts)


def _options() -> str:
    """The groups of options that several commands take."""
    parts = []
    for panel in dict.fromkeys(group.panel for group in GROUPS.values()):
        options = {
            name: option
            for group in GROUPS.values()
            if group.panel == panel
            for name, option in group.options.items()
        }
        rows = [
            (
                _code("/".join(flags_of(name))),
                _code(option.metavar),
                option.help,
                _code(option.default),
            )
            for name, option in options.items()
        ]
        table = _table(("option", "value", "what it is", "default"), rows)
        parts.append(f"## {panel} options\n\n{table}\n")
    return "\n".join(parts)


def _entries(value: Any) -> dict[str, str]:
    """What a docstring says of each name: lines such as `name  what it is`."""
    found = ENTRY.findall(inspect.getdoc(value) or "")
    return {name: " ".join(text.split()) for name, text in found}


def _manifest() -> str:
    """Every key of a manifest, section by section. Options have a page of their own."""
    parts = []
    options = {field.name for field in dataclasses.fields(QuantConfig)}
    names: dict[Any, list[str]] = {}
    for name, section in SECTIONS.items():
        names.setdefault(section, []).append(f"`{name}`" if name else "Top level")
    for section, headings in names.items():
        said = _entries(Contract) if headings == ["`contract`"] else _entries(section)
        assert said.keys() == section.model_fields.keys() - options, headings
        table = _table(("key", "what it is"), [(_code(key), said[key]) for key in said])
        parts.append(f"## {' and '.join(headings)}\n\n{table}\n")
        if options & section.model_fields.keys():
            link = "[quantization options](commands.md#quantization-options)"
            parts.append(f"And each of the {link}, as `layer_bits` for `--layer-bits`.\n")
    return "\n".join(parts)


def _docstring(value: Any) -> str:
    return f"```text\n{inspect.getdoc(value) or ''}\n```\n"


def _signature(function: Callable[..., Any]) -> str:
    """The head of the function, as it stands in its source."""
    source = inspect.getsource(function)
    head = source[source.index("def ") : source.index('"""')].rstrip().removesuffix(":")
    return f'```python title="signature"\n{head.removeprefix("def ")}\n```\n\n'


def _python() -> str:
    """The public functions and classes with their docstrings."""
    parts = []
    for names in quant_core.PUBLIC.values():
        for name in names:
            value = getattr(quant_core, name)
            shown = _signature(value) if inspect.isfunction(value) else ""
            parts.append(f"## {name}\n\n{shown}{_docstring(value)}")
    return "\n".join(parts)


def _reports() -> str:
    """The columns of every Parquet table, with the comments that stand beside them in the code."""
    parts = []
    for name, row in TABLES.items():
        found = COLUMN.findall(inspect.getsource(row))
        columns = [(_code(column), _code(kind), comment) for column, kind, comment in found]
        table = _table(("column", "type", "what it is"), columns)
        parts.append(f"## {name}\n\n{inspect.getdoc(row)}\n\n{table}\n")
    return "\n".join(parts)


def _metrics() -> str:
    rows = [
        (
            _code(name),
            "yes" if metric.needs_labels else "no",
            "yes" if metric.of_float is not None else "no",
            metric.missing,
        )
        for name, metric in METRICS.items()
    ]
    headings = ("metric", "needs labels", "has a float value to drop from", "if it is missing")
    return _table(headings, rows)


def _operators() -> str:
    rows = []
    for name, rule in sorted(RULES.items()):
        ways = ", ".join(str(way) for way in rule.computes) or "float"
        rows.append((_code(name), str(rule.kind), ways, "yes" if rule.weights else ""))
    return _table(("operator", "kind", "may compute, beside float", "has a weight"), rows)


def _targets() -> str:
    rows = [
        (
            _code(t.name),
            f"{'int' if t.activation_signed else 'uint'}{t.activation_bits}",
            "yes" if t.saturates else "no",
            ", ".join(str(way) for way in t.times),
            ", ".join(sorted(t.slow_in_integers)),
            t.note,
        )
        for t in TARGETS.values()
    ]
    headings = (
        *("target", "activations", "weights are kept from saturating"),
        *("what may pay", "slower in integers", "note"),
    )
    return _table(headings, rows)


def _rewrites() -> str:
    rows = [
        (_code(name), kind, (inspect.getdoc(rule) or "").partition("\n\n")[0])
        for kind, rules in (("exact", EXACT), ("timed", TIMED))
        for name, rule in rules.items()
    ]
    return _table(("rule", "kind", "what it does"), rows)


def _range_methods() -> str:
    rows = [
        (_code(name), (inspect.getdoc(method) or "").partition("\n\n")[0])
        for name, method in RANGE_METHODS.items()
    ]
    return _table(("method", "range of an activation"), rows)


GENERATED: Mapping[str, Callable[[], str]] = {
    "commands": _commands,
    "options": _options,
    "manifest": _manifest,
    "python": _python,
    "reports": _reports,
    "metrics": _metrics,
    "operators": _operators,
    "targets": _targets,
    "rewrites": _rewrites,
    "range_methods": _range_methods,
}
