"""What a command line answers, for tests of commands."""

from __future__ import annotations

import json

from flows.cli.commands import main


def answer_of(capsys, line: str):
    """Exit code and JSON of a command line, which must have a text form too."""
    assert main(line.split()) in (0, 1)
    assert capsys.readouterr().out.strip()
    code = main([*line.split(), "--format", "json"])
    return code, json.loads(capsys.readouterr().out)
