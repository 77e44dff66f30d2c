"""The journal: whole lines, one writer, and up to date means that the files are unchanged."""

from __future__ import annotations

import errno
import json
import os
from datetime import UTC, datetime, timedelta

import onnx
import pyarrow.parquet
import pytest

from flows.batch.digests import job_digest
from flows.batch.publish import publish
from flows.batch.rebuild import rebuild
from flows.entries import EndEntry, ModelEntry, RunEntry, new_run_id, now_after, read_entry
from flows.journal import open_journal
from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.contract import Verdict
from quant_core.model.locations import model_files
from tasks.cache import files_digest
from tasks.rows import ModelRow, Outcome, TimingRow
from tests.models import save_apart


def run_entry(run_id="1", request="a"):
    return RunEntry(run_id, request, datetime(2026, 1, 1, tzinfo=UTC))


def end_entry(run_id="1"):
    return EndEntry(run_id, datetime(2026, 1, 2, tzinfo=UTC), {"done": 1})


def model_entry(run_id, output, files=None, digest="d1", timings=()):
    row = ModelRow(
        run_id=run_id,
        model="m",
        digest=digest,
        input="m.onnx",
        output=str(output),
        outcome=Outcome.DONE,
        verdict=Verdict.NONE,
    )
    return ModelEntry(run_id, "m", digest, row, files=files or {}, timings=timings)


def timing(digest):
    return TimingRow(run_id="1", model="m", digest=digest, stage="benchmark", speedup_lo=1.5)


# Lines as an earlier version wrote them: without columns that have no value, with other names.
OLD_RUN = {
    "event": "run",
    "run_id": "r1",
    "request": "q",
    "started_at": "2026-01-02T03:04:05+00:00",
}
OLD_ROW = {
    "model": "m",
    "digest": "d1",
    "input": "/in/m.onnx",
    "outcome": "done",
    "verdict": "met",
    "bits": 8,
    "metric": None,
    "accuracy": 0.5,
    "started_at": "2026-01-02T03:04:06+00:00",
    "finished_at": "2026-01-02T03:04:09.000007+00:00",
    "retired": "a column that is gone",
    "run_id": "r1",
}
OLD_OF = {"run_id": "r1", "model": "m", "digest": "d1"}
OLD_MODEL = {
    "event": "model",
    "run_id": "r1",
    "name": "m",
    "digest": "d1",
    "layers": [{**OLD_OF, "position": 0, "node": "conv", "alone_db": 31.0, "so_far_db": 29.0}],
    "timings": [{**OLD_OF, "stage": "prepare", "seconds": 1, "peak_bytes": 7}],
}


def old_lines(output, files):
    row = {**OLD_ROW, "output": str(output)}
    return [json.dumps(line) for line in (OLD_RUN, {**OLD_MODEL, "files": files, "row": row})]


def test_a_journal_of_an_earlier_version_is_read(tmp_path):
    output = tmp_path / "m.onnx"
    output.write_bytes(b"model")
    (tmp_path / ".quantmill").mkdir()
    lines = old_lines(output, files_digest(tmp_path, ["m.onnx"]))
    (tmp_path / ".quantmill" / "journal.jsonl").write_text("\n".join(lines) + "\n")

    with open_journal(tmp_path) as journal:
        run, finished = journal.begin_run("q")
        made = journal.up_to_date(output, "d1")

    assert (run.run_id, list(finished)) == ("r1", [str(output)])
    assert (made.row.outcome, made.row.verdict, made.row.accuracy) == ("done", "met", 0.5)
    assert made.row.error is None
    assert (made.layers[0].isolated_db, made.layers[0].cumulative_db) == (31.0, 29.0)
    assert made.timings[0].peak_bytes == 7
    assert journal.peaks() == {("/in/m.onnx", "prepare"): 7}


@pytest.mark.parametrize("entry", [run_entry(), model_entry("1", "o.onnx"), end_entry()])
def test_an_entry_comes_back_from_its_line(entry):
    assert read_entry(json.loads(json.dumps(entry.to_json()))) == entry


@pytest.mark.parametrize(
    "line", ["null", "3", "[]", "{}", "[" * 5000, '{"event": "nap"}', '{"event": "model"}']
)
def test_a_line_that_is_no_entry_is_passed_over_and_counted(tmp_path, line):
    (tmp_path / ".quantmill").mkdir()
    (tmp_path / ".quantmill" / "journal.jsonl").write_text(line + "\n")

    with open_journal(tmp_path) as journal:
        assert journal.entries == []
        assert journal.skipped_lines == 1


def test_a_torn_last_line_is_dropped_and_the_next_one_is_whole(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.append(run_entry())
    path = tmp_path / ".quantmill" / "journal.jsonl"
    with path.open("a") as file:
        file.write('{"event": "mod')

    with open_journal(tmp_path) as journal:
        journal.append(end_entry())

    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "end"]


def test_a_line_for_which_the_disk_has_no_room_is_not_there_by_half(tmp_path, monkeypatch):
    with open_journal(tmp_path) as journal:
        journal.append(run_entry())
        write = os.write

        def full(fd, line):
            if len(line) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(fd, line[:10])

        monkeypatch.setattr("os.write", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(model_entry("1", "a" * 100))
        monkeypatch.undo()
        journal.append(end_entry())

    lines = (tmp_path / ".quantmill" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["run", "end"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_journal_that_is_gone_from_its_place_takes_no_entry(tmp_path, is_replaced):
    """Somebody removed the output folder while a batch worked: nobody would ever read the entry."""
    with open_journal(tmp_path) as journal:
        journal.append(run_entry())
        journal.path.unlink()
        if is_replaced:
            journal.path.touch()

        with pytest.raises(OSError, match=r"No such file|has taken its place"):
            journal.append(end_entry())


def test_a_run_that_was_cut_short_goes_on_if_the_same_is_asked_again(tmp_path):
    with open_journal(tmp_path) as journal:
        first, _ = journal.begin_run("this")
        journal.append(model_entry(first.run_id, tmp_path / "m.onnx"))

    with open_journal(tmp_path) as journal:
        again, finished = journal.begin_run("this")
    with open_journal(tmp_path) as journal:
        other, nothing = journal.begin_run("that")

    assert again == first
    assert list(finished) == [str(tmp_path / "m.onnx")]
    assert other != first
    assert not nothing


def test_ids_of_runs_sort_in_their_order_also_where_a_clock_was_ahead(tmp_path):
    ahead = new_run_id(datetime.now(UTC) + timedelta(days=3650))
    for kind, run_id in (("runs", ahead), ("audits", "99999999T999999-abcdef")):
        (tmp_path / "reports" / kind).mkdir(parents=True)
        (tmp_path / "reports" / kind / f"{run_id}.parquet").touch()

    with open_journal(tmp_path) as journal:
        ids = [journal.begin_run(request)[0].run_id for request in ("this", "that", "other")]

    assert [ahead, *ids] == sorted({ahead, *ids})


def test_nothing_ends_before_it_begins_also_where_the_clock_went_back():
    ahead = datetime.now(UTC) + timedelta(hours=3)

    assert now_after(ahead) == ahead
    assert now_after(ahead - timedelta(days=1)) > ahead - timedelta(days=1)


def test_up_to_date_means_made_from_this_and_unchanged_since(tmp_path):
    made, output = tmp_path / "made", tmp_path / "out" / "m.onnx"
    made.mkdir()
    (made / "m.onnx").write_bytes(b"model")
    (made / "m.onnx.data").write_bytes(b"weights")
    publish(made, files_digest(made, ["m.onnx", "m.onnx.data"]), output)
    files = files_digest(output.parent, ["m.onnx", "m.onnx.data"])

    with open_journal(tmp_path) as journal:
        journal.append(model_entry("1", output, files))

        assert journal.up_to_date(output, "d1")
        assert not journal.up_to_date(output, "d2")
        (output.parent / "m.onnx.data").write_bytes(b"WEIGHTS")
        assert not journal.up_to_date(output, "d1")


def test_a_large_journal_forgets_what_nobody_will_ask_for_but_never_a_run_that_was_cut_short(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("flows.journal.LARGE_BYTES", 100)
    output = tmp_path / "m.onnx"
    output.write_bytes(b"model")
    files = files_digest(tmp_path, ["m.onnx"])
    path = tmp_path / ".quantmill" / "journal.jsonl"
    with open_journal(tmp_path) as journal:
        for number, (digest, timed) in enumerate(
            [("old", True), ("new", True), ("new", False), ("new", False)]
        ):
            timings = (timing(digest),) if timed else ()
            journal.append(run_entry(str(number)))
            journal.append(model_entry(str(number), output, files, digest, timings))
            journal.append(end_entry(str(number)))

    with open_journal(tmp_path) as journal:
        kept = [(entry.run_id, entry.event) for entry in journal.entries]
        assert journal.up_to_date(output, "new")
        assert not journal.up_to_date(output, "old")
        with pytest.raises(RequestError, match="another batch"), open_journal(tmp_path):
            pass
        journal.append(run_entry("4"))
    before = path.read_bytes()
    with open_journal(tmp_path):
        pass

    assert kept == [("1", "model"), ("3", "model"), ("3", "end")]
    assert path.read_bytes() == before


def test_publishing_twice_does_the_same_and_leaves_nothing_behind(tmp_path):
    made, output = tmp_path / "made", tmp_path / "out" / "m.onnx"
    made.mkdir()
    (made / "m.onnx").write_bytes(b"model")

    publish(made, files_digest(made, ["m.onnx"]), output)
    publish(made, files_digest(made, ["m.onnx"]), output)

    assert output.read_bytes() == b"model"
    assert [path.name for path in output.parent.iterdir()] == ["m.onnx"]


def test_torn_reports_are_written_again_from_the_journal_or_set_aside(tmp_path):
    output = tmp_path / "m.onnx"
    with open_journal(tmp_path) as journal:
        journal.append(run_entry("1"))
        journal.append(model_entry("1", output))
        journal.append(end_entry("1"))
    models = tmp_path / "reports" / "models"

    written, skipped_lines = rebuild(tmp_path)
    assert {path.parent.name for path in written} == {"models", "layers", "timings"}
    assert skipped_lines == 0
    (models / "1.parquet").write_bytes(b"PAR1 torn")
    (models / "0.parquet").write_bytes(b"")
    (models / "00.parquet").write_bytes(b"PAR1 with a hole PAR1")
    with (tmp_path / ".quantmill" / "journal.jsonl").open("a") as file:
        file.write("null\n")
    assert rebuild(tmp_path)[1] == 1

    names = [".0.parquet.torn", ".00.parquet.torn", "1.parquet"]
    assert sorted(path.name for path in models.iterdir()) == names

    (models / "1.parquet").unlink()
    for name in ("0.parquet", "1.parquet"):
        (models / name / "in the way").mkdir(parents=True)
    rebuild(tmp_path)
    assert sorted(path.name for path in models.iterdir()) == names
    (row,) = pyarrow.parquet.read_table(models / "1.parquet").to_pylist()
    assert row["output"] == str(output)


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

    journal = tmp_path / ".quantmill" / "journal.jsonl"
    journal.mkdir(parents=True)
    with pytest.raises(RequestError) as refused, open_journal(tmp_path):
        pass
    assert (refused.value.where, "is a directory" in refused.value.problem) == (str(journal), True)


def test_a_stage_s_answer_is_there_as_a_whole_or_not_at_all(tmp_path):
    with open_journal(tmp_path) as journal:
        stages = journal.stages("d")
        stages.keep("prepare", {"result": 1})
        (stages.folder / "quantize.json").write_text('{"resu')

        assert stages.answer("prepare") == {"result": 1}
        assert stages.answer("quantize") is None
        assert stages.answer("validate") is None


@pytest.mark.parametrize("torn", ["stats-0-of-1.npz", "out/m.onnx"])
def test_an_answer_whose_file_is_torn_is_dropped(tmp_path, torn):
    with open_journal(tmp_path) as journal:
        stages = journal.stages("d")
        (stages.folder / "out").mkdir()
        for name in ("stats-0-of-1.npz", "out/m.onnx"):
            (stages.folder / name).write_bytes(b"whole")
        stages.keep("calibrate", {"result": 1})
        stages.keep("quantize", {"result": 2})

        (stages.folder / torn).write_bytes(b"")

        assert (stages.answer("calibrate") is None) == torn.startswith("stats")
        assert (stages.answer("quantize") is None) == torn.startswith("out")


@pytest.mark.parametrize("kind", ["another answer", "no object", "a folder"])
def test_an_answer_that_its_stage_did_not_give_is_dropped_and_given_again(tmp_path, kind):
    with open_journal(tmp_path) as journal:
        stages = journal.stages("d")
        stages.keep("prepare", {"result": 1})
        path = stages.folder / "prepare.json"
        text = path.read_text()
        path.unlink()
        path.mkdir() if kind == "a folder" else path.write_text(
            "[]" if kind == "no object" else text.replace("result", "Result")
        )
        (stages.folder / "prepared.onnx").mkdir()

        assert stages.answer("prepare") is None
        stages.begin("prepare")
        assert not list(stages.folder.iterdir())
        stages.keep("prepare", {"result": 2})
        assert stages.answer("prepare") == {"result": 2}


def test_a_torn_file_is_never_published(tmp_path):
    with open_journal(tmp_path) as journal:
        stages = journal.stages("d")
        (stages.folder / "out").mkdir()
        (stages.folder / "out" / "m.onnx").write_bytes(b"whole")
        stages.keep("quantize", {})
        assert list(stages.made()) == ["m.onnx"]

        (stages.folder / "out" / "m.onnx").write_bytes(b"torn")

        with pytest.raises(OSError, match="not what the stage wrote"):
            stages.made()


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
    save_apart(onnx.load(job.input), job.input, "a.weights")
    weights = job.input.with_name("a.weights")

    first = job_digest(job)
    weights.write_bytes(weights.read_bytes()[::-1])
    second = job_digest(job)
    (tmp_path / "data.npy").write_bytes(b"other")
    third = job_digest(job)

    assert list(model_files(job.input)) == [job.input, weights]
    assert len({first, second, third}) == 3
    assert job_digest(job) == third


def test_what_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")

    with open_journal(tmp_path) as journal:
        journal.append(model_entry("1", tmp_path / "m.onnx", {"m.onnx": [5, "digest"]}))

        assert not journal.up_to_date(tmp_path / "m.onnx", "d1")


def test_a_group_may_share_an_output_folder_if_the_umask_lets_it(tmp_path):
    before = os.umask(0o002)
    try:
        with open_journal(tmp_path):
            pass
    finally:
        os.umask(before)

    assert (tmp_path / ".quantmill" / "journal.jsonl").stat().st_mode & 0o777 == 0o664
