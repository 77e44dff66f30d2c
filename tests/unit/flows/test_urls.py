"""A manifest whose models, data and outputs lie in stores."""

from __future__ import annotations

import errno
from pathlib import Path

import fsspec
import pytest

from flows.batch.digests import job_digest, url_contents
from flows.batch.publish import publish
from flows.batch.run import plan_batch
from flows.cli.commands import main
from flows.journal import journal_id
from flows.manifest.outputs import Owner, claim, is_output, output_test, read_owner
from flows.manifest.read import check_manifest
from quant_core.errors import RequestError
from tasks import stores
from tasks.cache import Cache
from tasks.contents import file_digest
from tasks.locations import Url
from tests.jobs import after_json
from tests.models import save_apart, tiny_cnn

STORE = Url("memory://urls")
MODEL = tiny_cnn().SerializeToString()


@pytest.fixture(autouse=True)
def store():
    for name in ("a.onnx", "sub/b.onnx", "sub/.hidden.onnx", "sub/notes.txt", "old/A.ONNX"):
        stores.write(STORE / "models" / name, MODEL)
    stores.write(STORE / "data.npy", b"samples")
    yield
    fsspec.filesystem("memory").store.clear()


def batch(**options):
    return {"batch": {"output_dir": f"{STORE}/out", **options}}


@pytest.mark.parametrize(
    ("input_dir", "names"),
    [
        (f"{STORE}/models", ["a.onnx"]),
        (f"{STORE}/models/*.onnx", ["a.onnx"]),
        (f"{STORE}/models/**/*.onnx", ["a.onnx", "sub/b.onnx"]),
        (f"{STORE}/models/old", ["old/A.ONNX"]),
    ],
)
def test_models_of_a_folder_or_glob_have_the_same_place_in_the_output_folder(
    input_dir, names, tmp_path
):
    manifest = check_manifest(batch(input_dir=input_dir), tmp_path)

    outputs = {
        "a.onnx": "a_int8.onnx",
        "sub/b.onnx": "sub/b_int8.onnx",
        "old/A.ONNX": "A_int8.onnx",  # a folder that is named is its models' place
    }
    assert {job.input: job.output for job in manifest.jobs} == {
        STORE / "models" / name: STORE / "out" / outputs[name] for name in names
    }


def test_a_manifest_with_urls_is_the_same_after_json(tmp_path):
    values = {"calibration": {"data": f"{STORE}/data.npy"}, **batch(input_dir=f"{STORE}/models")}

    manifest = check_manifest(values, tmp_path)

    assert after_json(manifest.jobs) == manifest.jobs
    assert manifest.jobs[0].calibration.source == f"{STORE}/data.npy"


def test_a_store_that_refuses_lacks_no_folder(tmp_path, monkeypatch):
    """As a bucket without credentials: neither the file nor what lies beside it is shown."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "the store refuses access")

    monkeypatch.setattr(Cache, "stat", refuse)
    monkeypatch.setattr("flows.manifest.files.listing", refuse)
    values = {"models": [{"input": f"{STORE}/models/a.onnx"}], **batch()}

    with pytest.raises(RequestError, match="the store refuses access") as caught:
        check_manifest(values, tmp_path)

    assert "no folder" not in str(caught.value)


def test_journal_and_reports_are_local(tmp_path):
    values = batch(input_dir=f"{STORE}/models")

    manifest = check_manifest(values, tmp_path)

    assert manifest.store == STORE / "out"
    assert manifest.folder == tmp_path / "quantmill" / "memory" / "urls" / "out"
    values["batch"]["work_dir"] = "here"
    assert check_manifest(values, tmp_path).folder == tmp_path / "here"


def test_local_models_may_go_to_a_store_and_back(tmp_path):
    (tmp_path / "local.onnx").write_bytes(MODEL)
    models = [
        {"input": "local.onnx", "output": f"{STORE}/out/local.onnx"},
        {"input": f"{STORE}/models/a.onnx", "output": "a.onnx"},
    ]

    jobs = check_manifest({"models": models}, tmp_path).jobs

    assert jobs[0].output == STORE / "out" / "local.onnx"
    assert jobs[1].output == tmp_path / "a.onnx"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (batch(input_dir=f"{STORE}/nowhere"), "no such file|no .onnx file"),
        ({"models": [{"input": f"{STORE}/models/x.onnx", "output": "x.onnx"}]}, "no such file"),
        (
            {"models": [{"input": f"{STORE}/a.onnx", "output": f"{STORE}/a.onnx"}]},
            "is also an input",
        ),
        ({"models": [{"input": f"{STORE}/models", "output": "x.onnx"}]}, "is a folder"),
        (batch(input_dir=f"{STORE}/models", work_dir=f"{STORE}/work"), "A local path"),
        (batch(input_dir="sftp://me:word@host/models"), "holds a password"),
        (batch(input_dir="models", output_dir="s3:/bucket/out"), "A URL begins with s3://"),
        (batch(input_dir=f"{STORE}/nothing", layout="huggingface"), "no .onnx file"),
    ],
)
def test_mistakes_of_urls_are_found_before_anything_starts(values, problem, tmp_path):
    with pytest.raises(RequestError, match=problem) as error:
        check_manifest(values, tmp_path)

    assert "word@" not in str(error.value)


def test_a_missing_model_of_several_is_a_row_of_its_own(tmp_path):
    models = [
        {"input": f"{STORE}/models/{name}.onnx", "output": f"{name}.onnx"} for name in ("a", "x")
    ]

    assert len(check_manifest({"models": models}, tmp_path).jobs) == 2


def test_outputs_of_an_earlier_run_are_no_models(tmp_path):
    values = {"batch": {"input_dir": f"{STORE}/models", "output_dir": f"{STORE}/models"}}
    (job,) = check_manifest(values, tmp_path).jobs
    claim(job.output, Owner(str(tmp_path)))
    stores.write(job.output, MODEL)

    assert [found.input for found in check_manifest(values, tmp_path).jobs] == [job.input]


def test_the_same_bytes_have_the_same_digest_in_a_store(tmp_path):
    local = tmp_path / "models"
    local.mkdir()
    save_apart(tiny_cnn(), local / "m.onnx", "m.data")
    (local / "data.npy").write_bytes(b"samples")
    for path in local.iterdir():
        stores.upload(path, STORE / "same" / path.name, 60.0)

    def job(place):
        models = [{"input": f"{place}/m.onnx", "output": "out/m.onnx"}]
        samples = {"calibration": {"data": f"{place}/data.npy"}}
        return check_manifest({"models": models, **samples}, tmp_path).jobs[0]

    in_store = job(STORE / "same")

    assert job_digest(in_store) == job_digest(job(local))
    contents = url_contents(in_store)
    assert list(contents[f"{STORE}/same/m.onnx"].files) == ["m.onnx", "m.data"]


def test_an_output_in_a_store_belongs_to_one_batch(tmp_path, monkeypatch):
    output, ours, theirs = STORE / "out" / "m.onnx", Owner("/ours"), Owner("/theirs", "m.yaml")
    claim(output, theirs)
    claim(output, theirs)

    claim(output, ours)  # there is no journal in /theirs on this host
    assert read_owner(output).folder == "/ours"
    monkeypatch.setattr("platform.node", lambda: "another-host")

    with pytest.raises(RequestError, match="output of another batch, whose journal is in /ours on"):
        claim(output, theirs)
    claim(output, theirs, take_over=True)
    assert read_owner(output).folder == "/theirs"
    assert output_test()(output)
    assert not output_test()(output.parent / "n.onnx")
    assert not is_output(Path("n.onnx"))


def test_a_new_output_is_claimed_without_a_look_whether_somebody_has_it(monkeypatch):
    output = STORE / "out" / "m.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("tasks.stores.read", lambda url: 1 / 0)
        claim(output, Owner("/ours"), is_new=True)
    monkeypatch.setattr("platform.node", lambda: "another-host")

    with pytest.raises(RequestError, match="output of another batch, whose journal is in /ours on"):
        claim(output, Owner("/theirs"), is_new=True)


def test_an_output_whose_key_is_too_long_for_a_store_is_never_claimed(tmp_path):
    folder = Url("s3://bucket") / "/".join(["k" * 200] * 5)

    with pytest.raises(RequestError, match="key of 1025 bytes is too long"):
        claim(folder / ("y" * 20), Owner(str(tmp_path)))


def test_a_journal_is_the_same_under_other_paths_and_another_one_under_the_same(
    tmp_path, monkeypatch
):
    output = STORE / "out" / "o.onnx"
    for name in ("one", "two"):
        (tmp_path / name / ".quantmill").mkdir(parents=True)
        (tmp_path / name / ".quantmill" / "journal.jsonl").touch()
    (tmp_path / "mount").symlink_to(tmp_path / "one")
    first, mounted, second = (journal_id(tmp_path / name) for name in ("one", "mount", "two"))
    assert first == mounted != second is not None

    claim(output, Owner(str(tmp_path / "one"), "m.yaml", journal=first))
    claim(output, Owner(str(tmp_path / "mount"), journal=mounted))
    monkeypatch.setattr("platform.node", lambda: "another-container")
    claim(output, Owner(str(tmp_path / "mount"), journal=mounted))
    monkeypatch.setattr("platform.node", lambda: "another-host")

    with pytest.raises(RequestError, match="is the output of another batch"):
        claim(output, Owner(str(tmp_path / "mount"), "m.yaml", journal=second))


def test_a_model_is_published_after_its_data(tmp_path, monkeypatch):
    sent, upload = [], stores.upload

    def note(path, url, limit_s):
        sent.append(url.name)
        upload(path, url, limit_s)

    monkeypatch.setattr(stores, "upload", note)
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_bytes(name.encode())
    files = {name: [len(name), file_digest(tmp_path / name)] for name in ("m.onnx", "m.onnx.data")}

    publish(tmp_path, files, STORE / "out" / "m.onnx")

    assert sent == ["m.onnx.data", "m.onnx"]
    assert stores.read(STORE / "out" / "m.onnx") == b"m.onnx"


@pytest.mark.parametrize(
    ("models", "inputs"),
    [
        (["models"], ["models/a.onnx"]),
        (["models/**/*.onnx"], ["models/a.onnx", "models/sub/b.onnx"]),
        (["models/sub/b.onnx"], ["models/sub/b.onnx"]),
        (["models/sub/b.onnx", "models/a.onnx"], ["models/sub/b.onnx", "models/a.onnx"]),
    ],
)
def test_the_command_batch_takes_urls(models, inputs, monkeypatch):
    found = []
    monkeypatch.setattr(
        "flows.cli.many_models._run_manifest", lambda manifest, *_: found.append(manifest) or 0
    )
    urls = [f"{STORE}/{model}" for model in models]

    assert main(["batch", *urls, "-o", f"{STORE}/out", "--data", f"{STORE}/data.npy"]) == 0

    assert [str(job.input) for job in found[0].jobs] == [f"{STORE}/{name}" for name in inputs]
    assert found[0].store == STORE / "out"
    assert found[0].jobs[0].calibration.source == f"{STORE}/data.npy"


def test_a_dry_run_plans_a_model_in_a_store_and_names_its_url(tmp_path):
    stores.write(STORE / "models" / "torn.onnx", b"no model")
    values = {"mode": "weight_only", **batch(input_dir=f"{STORE}/models")}

    made, torn = plan_batch(check_manifest(values, tmp_path))

    assert made["plan"]
    assert torn["error"]
    assert torn["where"] == torn["input"] == f"{STORE}/models/torn.onnx"
