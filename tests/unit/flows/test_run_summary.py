"""summary.json tells of a run from its first moment, and whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import json
import os

import pytest

from flows.batch.run import run_batch
from flows.batch.run_summary import (
    auditing,
    running_summary,
    summary_path,
    working_in,
    write_summary,
)
from flows.journal import open_journal
from flows.manifest.jobs import Manifest
from flows.manifest.read import check_manifest
from flows.runtime import dask, signals
from quant_core.errors import QuantError, RequestError


@pytest.fixture
def manifest(tmp_path):
    (tmp_path / "m.onnx").touch()
    models = [{"input": "m.onnx", "output": "out/m.onnx"}]
    return check_manifest({"models": models}, tmp_path)


def read(manifest: Manifest) -> dict:
    return json.loads((manifest.folder / "reports" / "summary.json").read_text())


def break_off(manifest: Manifest) -> None:
    with working_in(manifest):
        assert (read(manifest)["state"], read(manifest)["pid"]) == ("Running", os.getpid())
        raise QuantError("no Prefect here")


def test_an_error_ends_it_as_failed(manifest):
    with pytest.raises(QuantError):
        break_off(manifest)

    assert (read(manifest)["state"], read(manifest)["message"]) == ("Failed", "no Prefect here")


def test_a_full_disk_ends_it_as_failed_too(manifest, monkeypatch):
    def no_room(path):
        raise OSError(errno.ENOSPC, "no space left on device", str(path))

    path = summary_path("batch", manifest.folder)
    with working_in(manifest):
        monkeypatch.setattr("flows.batch.run_summary.atomic_write", no_room)
        write_summary(path, {**read(manifest), "state": "Failed"})
        assert read(manifest)["state"] == "Failed"

        with pytest.raises(OSError, match="No space left"):  # for so much more
            write_summary(path, {"wrong": [{"error": "x" * 100_000}]})
        assert read(manifest)["state"] == "Failed"


def test_a_signal_ends_it_as_stopped(manifest):
    with working_in(manifest):
        for action in signals._BEFORE_STOP:
            action()

        assert read(manifest)["state"] == "Stopped"


def test_a_run_that_was_killed_is_named_by_the_next_one(manifest):
    with working_in(manifest):
        killed = read(manifest)
    assert killed["state"] == "Running"  # nothing was written at its end

    with working_in(manifest):
        assert read(manifest)["interrupted"]["pid"] == killed["pid"]


def test_a_batch_that_fails_before_prefect_has_started_leaves_its_summary(manifest, monkeypatch):
    @contextlib.contextmanager
    def api_and_dask(*options):
        raise QuantError("Prefect's server does not answer")
        yield

    monkeypatch.setattr(dask, "api_and_dask", api_and_dask)

    with pytest.raises(QuantError):
        run_batch(manifest)

    assert read(manifest)["state"] == "Failed"
    assert "does not answer" in read(manifest)["message"]


def test_a_batch_that_is_turned_away_starts_nothing_and_writes_no_summary(manifest, monkeypatch):
    monkeypatch.setattr(dask, "api_and_dask", None)
    with working_in(manifest):
        before = read(manifest)

        with pytest.raises(RequestError, match="another batch or audit is working there"):
            run_batch(manifest)

        assert read(manifest) == before
    with open_journal(manifest.folder):
        pass


def test_nobody_audits_where_a_batch_works_and_no_batch_begins_where_somebody_audits(manifest):
    for one, other in ((working_in(manifest), auditing), (auditing(manifest.folder), auditing)):
        with one, pytest.raises(RequestError, match="audit is working there"):
            other(manifest.folder).__enter__()
    with auditing(manifest.folder), pytest.raises(RequestError, match="audit is working there"):
        working_in(manifest).__enter__()


def test_a_summary_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "reports").touch()

    with pytest.raises(RequestError, match="cannot be written"), running_summary("audit", tmp_path):
        pass
