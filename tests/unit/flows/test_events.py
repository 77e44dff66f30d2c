"""A program that reads the JSON lines of a run finds the same keys as ever."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from flows.console.events import (
    Made,
    ModelDone,
    PhaseBegan,
    SkippedLines,
    StageBegan,
    Started,
    Starting,
    Waiting,
    event_json,
)
from flows.console.progress import _LiveTable, progress
from quant_core.evaluate.contract import Verdict
from tasks.rows import AuditOutcome, AuditRow, ModelRow, Outcome

MADE = ModelRow(
    run_id="r",
    model="m",
    digest="d",
    input="m.onnx",
    output="o.onnx",
    outcome=Outcome.DONE,
    verdict=Verdict.NOT_MET,
    reason="speedup 0.50, at least 1",
)
KEPT = AuditRow(run_id="r", model="m", digest="d", output="o.onnx", outcome=AuditOutcome.KEPT)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (Starting(), {"event": "starting", "unused_settings": []}),
        (Started("r", 3, 2), {"event": "started", "run_id": "r", "models": 3, "workers": 2}),
        (PhaseBegan("benchmark", 3), {"event": "phase", "phase": "benchmark", "models": 3}),
        (
            StageBegan("m", "o.onnx", "prepare"),
            {"event": "stage", "model": "m", "output": "o.onnx", "stage": "prepare"},
        ),
        (
            Waiting("m", "o.onnx", 60.0),
            {"event": "waiting", "model": "m", "output": "o.onnx", "seconds": 60.0},
        ),
        (SkippedLines("f", 2), {"event": "skipped_lines", "file": "f", "lines": 2}),
        (Made("m", "o.onnx"), {"event": "made", "model": "m", "output": "o.onnx"}),
    ],
)
def test_an_event_is_one_flat_json_object(event, line, capsys):
    with progress(as_json=True) as listener:
        listener(event)

    assert json.loads(capsys.readouterr().out) == line


def test_a_finished_model_is_its_row_and_has_a_verdict_in_an_audit_too():
    made, kept = event_json(ModelDone(MADE)), event_json(ModelDone(KEPT))

    assert made == {"event": "model", **MADE.to_json()}
    assert made["verdict"] == "not_met"
    assert kept == {"event": "model", "verdict": "none", **KEPT.to_json()}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (MADE, "m (o): not met: speedup 0.50, at least 1"),
        (replace(MADE, verdict=Verdict.NONE, reason="no contract"), "m (o): done"),
        (KEPT, "m (o): kept"),
    ],
)
def test_a_log_has_a_line_for_each_finished_model(row, words, capsys):
    with progress(as_json=False) as listener:
        listener(ModelDone(row))

    assert capsys.readouterr().err.split(" ", 1)[1] == f"{words}\n"


def test_two_outputs_of_one_model_are_two_lines_of_the_live_table():
    table = _LiveTable()
    for output in ("m_int8.onnx", "m_int4.onnx"):
        table.update(StageBegan("m", output, "quantize"))
    table.update(ModelDone(replace(MADE, output="m_int4.onnx")))

    console = Console(width=80)
    with console.capture() as shown:
        console.print(table.draw())

    finished, working = [" ".join(line.split()) for line in shown.get().splitlines()][:2]
    assert finished == "m (m_int4) not met: speedup 0.50, at least 1"
    assert working == "m (m_int8) quantize 0 s"
