"""The journal: whole lines, one writer; done means that the files are still what they were."""

from __future__ import annotations

import errno
import json
import os

import onnx
import pytest

from flows.batch.digests import files_digest, job_digest, model_files
from flows.batch.journal import open_journal, publish
from quant_core.errors import ModelError, RequestError


def model_entry(run_id, output, files, digest="d1", outcome="done"):
    row = {"output": str(output), "outcome": outcome}
    return {
        "event": "model",
        "run_id": run_id,
        "name": "m",
        "digest": digest,
        "row": row,
        "files": files,
        "timings": [],
    }


def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.append({"event": "run", "run_id": "1", "request": "a", "started_at": "x"})
    path = tmp_path / ".quantmill" / "journal.jsonl"
    with path.open("a") as file:
        file.write('{"event": "mod')

    with open_journal(tmp_path) as journal:
        journal.append({"event": "end", "run_id": "1"})

    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "end"]


def test_a_line_for_which_the_disk_has_no_room_is_not_there_by_half(tmp_path, monkeypatch):
    with open_journal(tmp_path) as journal:
        journal.append({"event": "run", "run_id": "1", "request": "a", "started_at": "x"})
        write = os.write

        def full(fd, line):
            if len(line) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, line[:10])

        monkeypatch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append({"event": "model", "name": "a" * 100})
        monkeypatch.undo()
        journal.append({"event": "end", "run_id": "1"})

    lines = (tmp_path / ".quantmill" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["run", "end"]


def test_a_run_that_was_cut_short_goes_on_if_the_same_is_asked_again(tmp_path):
    with open_journal(tmp_path) as journal:
        first, _ = journal.begin_run("this")
        journal.append(model_entry(first, tmp_path / "m.onnx", {}))

    with open_journal(tmp_path) as journal:
        again, finished = journal.begin_run("this")
    with open_journal(tmp_path) as journal:
        other, nothing = journal.begin_run("that")

    assert again == first
    assert list(finished) == ["m"]
    assert other != first
    assert not nothing


def test_up_to_date_means_made_from_this_and_unchanged_since(tmp_path):
    made, output = tmp_path / "made", tmp_path / "out" / "m.onnx"
    made.mkdir()
    (made / "m.onnx").write_bytes(b"model")
    (made / "m.onnx.data").write_bytes(b"weights")
    files = publish(made, output)

    with open_journal(tmp_path) as journal:
        journal.append(model_entry("1", output, files))

        assert journal.up_to_date(output, "d1")
        assert not journal.up_to_date(output, "d2")
        (output.parent / "m.onnx.data").write_bytes(b"WEIGHTS")
        assert not journal.up_to_date(output, "d1")


def test_a_large_journal_forgets_what_nobody_will_ask_for_but_never_a_run_that_was_cut_short(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("flows.batch.journal.LARGE_BYTES", 100)
    output = tmp_path / "m.onnx"
    output.write_bytes(b"model")
    files = files_digest(tmp_path, ["m.onnx"])
    path = tmp_path / ".quantmill" / "journal.jsonl"
    with open_journal(tmp_path) as journal:
        for number, (digest, timings) in enumerate(
            [("old", [{}]), ("new", [{}]), ("new", []), ("new", [])]
        ):
            journal.append(
                {"event": "run", "run_id": str(number), "request": "a", "started_at": "x"}
            )
            journal.append({**model_entry(str(number), output, files, digest), "timings": timings})
            journal.append({"event": "end", "run_id": str(number)})

    with open_journal(tmp_path) as journal:
        kept = [(entry["run_id"], entry["event"]) for entry in journal.entries]
        assert journal.up_to_date(output, "new")
        assert not journal.up_to_date(output, "old")
        with pytest.raises(RequestError, match="another batch"), open_journal(tmp_path):
            pass
        journal.append({"event": "run", "run_id": "4", "request": "a", "started_at": "x"})
    before = path.read_bytes()
    with open_journal(tmp_path):
        pass

    assert kept == [("1", "model"), ("3", "model"), ("3", "end")]
    assert path.read_bytes() == before


def test_publishing_twice_does_the_same_and_leaves_nothing_behind(tmp_path):
    made, output = tmp_path / "made", tmp_path / "out" / "m.onnx"
    made.mkdir()
    (made / "m.onnx").write_bytes(b"model")

    assert publish(made, output) == publish(made, output)

    assert output.read_bytes() == b"model"
    assert [path.name for path in output.parent.iterdir()] == ["m.onnx"]


def test_two_batches_never_write_one_folder(tmp_path):
    with (
        open_journal(tmp_path),
        pytest.raises(RequestError, match="another batch"),
        open_journal(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(RequestError, match="cannot be written"), open_journal(tmp_path / "file"):
        pass


def test_a_stage_s_answer_is_there_as_a_whole_or_not_at_all(tmp_path):
    with open_journal(tmp_path) as journal:
        stages = journal.stages("d")
        stages.keep("prepare", {"result": 1})
        (stages.folder / "quantize.json").write_text('{"resu')

        assert stages.answer("prepare") == {"result": 1}
        assert stages.answer("quantize") is None
        assert stages.answer("validate") is None


def test_a_file_that_is_still_being_written_is_waited_for_but_not_for_ever(mill, monkeypatch):
    job = mill("a").jobs[0]
    settled = job_digest(job)
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr("flows.batch.digests.time.monotonic", lambda: now)
    monkeypatch.setattr("flows.batch.digests.time.sleep", sleep)
    clock = job.input.stat().st_mtime
    monkeypatch.setattr("flows.batch.digests.time.time", lambda: clock + min(now, 1.0))
    assert job_digest(job) == settled

    monkeypatch.setattr("flows.batch.digests.time.time", lambda: clock + 0.5)  # as new as ever
    with pytest.raises(ModelError, match="still being written"):
        job_digest(job)
    assert now > 60


def test_a_model_s_digest_covers_its_external_data_and_its_samples(mill, tmp_path):
    job = mill("a").jobs[0]
    onnx.save(
        onnx.load(job.input),
        job.input,
        save_as_external_data=True,
        location="a.weights",
        size_threshold=0,
    )
    weights = job.input.with_name("a.weights")

    first = job_digest(job)
    weights.write_bytes(weights.read_bytes()[::-1])
    second = job_digest(job)
    (tmp_path / "data.npy").write_bytes(b"other")
    third = job_digest(job)

    assert list(model_files(job.input)) == [job.input, weights]
    assert len({first, second, third}) == 3
    assert job_digest(job) == third
