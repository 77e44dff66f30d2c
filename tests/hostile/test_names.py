"""Names from strangers' files never steer a terminal: control characters are shown, not sent."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console

from flows.console import printing, run_views
from flows.console.events import ModelDone
from flows.console.progress import progress
from flows.manifest.read import check_manifest
from quant_core.errors import ModelError, QuantError, RequestError
from tasks.rows import ModelRow
from tests.models import tiny_cnn

ROOT = Path(__file__).parents[2]
EVIL = "\x1b]0;owned\x07\x1b[31m\r\x9b2J\u202egnp\u2028\x00"
PATHS = {"run_id": "r", "digest": "", "input": EVIL, "output": EVIL}
ROW = {
    "model": EVIL,
    "outcome": "failed",
    "verdict": "none",
    "stage": EVIL,
    "error": EVIL,
    "where": EVIL,
}


def is_tame(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def drawn(view) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(view)
    return console.file.getvalue()


def test_tables_show_control_characters_as_escapes():
    for row in (
        ROW,
        ROW | {"outcome": "done", "verdict": "not_met", "reason": EVIL, "metric": EVIL},
    ):
        text = drawn(run_views.batch_table([row]))
        assert is_tame(text)
        assert r"\x1b" in text


def test_lines_of_progress_show_control_characters_as_escapes(capsys):
    for as_json in (False, True):
        with progress(as_json) as tell:
            tell(ModelDone(ModelRow.from_json({**ROW, **PATHS})))
    seen = capsys.readouterr()

    assert is_tame(seen.out + seen.err)
    assert json.loads(seen.out)["model"] == EVIL


def test_errors_show_control_characters_as_escapes(capsys):
    error = ModelError(f"bad {EVIL}\nsecond line", EVIL, EVIL)

    printing.print_error(error, as_json=False)

    assert is_tame(capsys.readouterr().err)
    assert is_tame(str(error))
    assert str(error).count("\n") == 1
    assert is_tame(repr(error))
    assert (
        pickle.loads(pickle.dumps(error)).problem == error.problem
    )  # what is kept is what was there


def test_mistakes_of_a_manifest_show_control_characters_as_escapes(tmp_path):
    with pytest.raises(RequestError) as error:
        check_manifest(
            {EVIL: 1, "models": [{"input": EVIL.strip("\0"), "output": "o.onnx"}]}, tmp_path
        )

    assert is_tame(str(error.value))


def test_prefect_s_tables_neither_steer_nor_format():
    from flows.console.artifacts import cell

    assert cell(f"a|b`<img src=x>{EVIL}") == r"a\|b&#96;&lt;img src=x&gt;" + cell(EVIL)
    assert is_tame(cell(EVIL))
    assert cell(0.123456) == "0.1235"
    assert cell(None) == ""


@pytest.mark.parametrize("command", ["info", "quantize"])
def test_commands_show_control_characters_as_escapes(tmp_path, command):
    name = EVIL.replace("\0", "")
    model = tiny_cnn()
    model.graph.name = model.graph.node[0].name = name
    for value in (*model.graph.input, *model.graph.output):
        value.name = name
    onnx.save(model, tmp_path / f"{name}.onnx")
    np.save(tmp_path / "d.npy", np.ones((1, 1)))
    arguments = {"info": [], "quantize": ["-o", "out.onnx", "--data", "d.npy"]}[command]

    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.commands", command, f"{name}.onnx", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        check=False,
    )

    assert is_tame(done.stdout.decode() + done.stderr.decode())
    assert b"x1b" in done.stdout + done.stderr


def test_a_quant_error_is_one_line_a_line():
    assert str(QuantError("a\nb", "c", "d")) == "c: a\nb (d)"
