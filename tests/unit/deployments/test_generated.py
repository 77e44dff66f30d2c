"""The parts of the documentation that are written from the code say something of everything."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "deployments" / "docs" / "generated.py"
spec = importlib.util.spec_from_file_location("generated", FILE)
generated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generated)


@pytest.mark.parametrize("name", generated.GENERATED)
def test_no_cell_and_no_docstring_is_missing(name):
    text = generated.GENERATED[name]()

    assert len(text) > 200
    assert "```text\n\n```" not in text
    assert " at 0x" not in text


def test_a_key_of_the_manifest_without_an_explanation_is_noticed(monkeypatch):
    monkeypatch.setattr(generated, "_entries", lambda section: {})

    with pytest.raises(AssertionError):
        generated.GENERATED["manifest"]()
