"""Answers and errors are text for people or JSON for programs."""

from __future__ import annotations

import io
import json

import pytest
import typer
from rich.console import Console

from flows.cli.command import Answer, register
from flows.console import formats, model_views, printing, run_views
from quant_core.errors import DataError


def answering(function):
    app = typer.Typer()
    register(app, function)

    def run(*arguments):
        try:
            app(list(arguments))
        except SystemExit as done:
            return done.code

    return run


def test_an_answer_is_text_or_json(capsys):
    def probe() -> Answer:
        return Answer(
            {"snr": float("inf"), "rows": ({"a": 1},)}, lambda data: "for people", exit_code=1
        )

    run = answering(probe)

    assert run() == 1
    assert capsys.readouterr().out == "for people\n"
    assert run("--format", "json") == 1
    assert json.loads(capsys.readouterr().out) == {"snr": None, "rows": [{"a": 1}]}
    assert run("--format", "xml") == 2


def test_an_error_is_a_sentence_and_a_hint_or_a_json_object(capsys):
    def probe() -> Answer:
        raise DataError("holds NaN", "d.npy, sample 3", "Drop it")

    run = answering(probe)

    assert run() == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: d.npy, sample 3 holds NaN\nhint: Drop it\n")
    assert run("--format", "json") == 1
    error = {
        "kind": "DataError",
        "problem": "holds NaN",
        "where": "d.npy, sample 3",
        "hint": "Drop it",
    }
    assert json.loads(capsys.readouterr().out) == {"error": error}


def test_a_bug_shows_a_traceback_only_for_debugging(capsys, monkeypatch):
    def probe() -> Answer:
        raise ZeroDivisionError("oh")

    run = answering(probe)

    assert run() == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().err
    monkeypatch.setenv("QUANTMILL_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run()


def test_names_from_files_cannot_drive_the_terminal(capsys):
    evil = "conv\x1b[31m\x07\u202e[bold]x[/bold]\udc80"
    nodes = [
        {
            "node": evil,
            "op_type": "Conv",
            "compute": "float",
            "storage": "int8",
            "elements": 9,
            "reason": evil,
        }
    ]

    printing.print_answer({"target": "portable", "nodes": nodes}, model_views.plan_view)
    printing.print_error(DataError(evil, evil, evil), as_json=False)

    out, err = capsys.readouterr()
    for text in (out, err):
        assert "conv\\x1b[31m\\x07\\u202e[bold]x[/bold]\\udc80" in text
        assert "\x1b" not in text


def test_a_table_in_a_pipe_is_not_squeezed(capsys):
    rows = [
        {
            "node": "block/" * 20,
            "op_type": "Conv",
            "compute": "static",
            "storage": "int8",
            "elements": 1,
            "reason": "",
        }
    ]

    printing.print_answer({"target": "portable", "nodes": rows}, model_views.plan_view)

    assert "block/" * 20 in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_terminal_shows_numbers_whole_and_as_many_columns_as_fit(width):
    row = {
        "model": "language_transformer",
        "outcome": "done",
        "verdict": "met",
        "metric": "top1",
        "accuracy": 0.95,
        "accuracy_float": 0.96,
        "busy": True,
        "float_size_bytes": 802_400,
        "size_bytes": 221_900,
        "float_ms": 0.48,
        "speedup": 1.5,
    }
    console = Console(width=width, file=io.StringIO())

    console.print(run_views.batch_table([row]))

    text = console.file.getvalue()
    shown = "language_transformer  3.62x smaller  96.00 % -> 95.00 %  1.50x (busy)  met"
    assert all(word in text for word in shown.split("  "))
    assert ("802.4 kB -> 221.9 kB" in text) == (width > 80)
    assert ("0.480 ms -> 0.320 ms" in text) == (width == 200)


def test_a_batch_says_what_makes_a_verdict_doubtful(capsys):
    printing.print_answer(
        [{"model": "m", "outcome": "done", "verdict": "met", "note": "only guesses"}],
        run_views.batch_table,
    )

    assert "met: only guesses" in capsys.readouterr().out


def test_sizes_and_shares_read_as_a_person_writes_them():
    sizes = {48: "48 B", 1234: "1.2 kB", 2_500_000: "2.50 MB", None: ""}
    assert [formats.format_size(size) for size in sizes] == [*sizes.values()]
    assert [formats.format_ratio(4, after) for after in (1, 4, 8, None)] == [
        "4.00x smaller",
        "1.00x smaller",
        "2.00x larger",
        "",
    ]
    assert (formats.format_percent(0.98765), formats.format_percent(None)) == ("98.77 %", "")
    shown = {0.04: "0.040 ms", 1.23456: "1.23 ms", 2345.6: "2,346 ms", None: ""}
    assert [formats.format_ms(value) for value in shown] == [*shown.values()]
