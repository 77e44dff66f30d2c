"""The manifest: what is accepted, and how all its mistakes are reported at once."""

from __future__ import annotations

import fcntl
import resource
from concurrent.futures import ThreadPoolExecutor

import onnx
import pytest

from flows.manifest.files import MOST_NAMES, unreadable_file
from flows.manifest.jobs import SampleSpec
from flows.manifest.outputs import Owner, claim, read_owner
from flows.manifest.read import check_manifest, read_manifest
from quant_core.config import Contract
from quant_core.errors import RequestError
from tests.jobs import after_json
from tests.models import tiny_cnn


@pytest.fixture
def folder(tmp_path):
    for name in ("models/resnet18.onnx", "models/b.onnx", "data.npy", "labels.npy"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def mistakes(values, folder) -> list[str]:
    with pytest.raises(RequestError) as error:
        check_manifest(values, folder)
    assert error.value.exit_code == 2
    return [line.strip() for line in error.value.problem.splitlines()[1:]]


def test_the_readme_form_is_read_from_yaml_and_toml_alike(folder):
    (folder / "m.yaml").write_text("""
bits: 8
per_channel: true
models: [{input: models/resnet18.onnx, output: quantized/resnet18_int8.onnx}]
batch: {input_dir: "models/*.onnx", output_dir: quantized/, skip_existing: true}
""")
    (folder / "m.toml").write_text("""
bits = 8
per_channel = true
models = [{input = "models/resnet18.onnx", output = "quantized/resnet18_int8.onnx"}]
batch = {input_dir = "models/*.onnx", output_dir = "quantized/", skip_existing = true}
""")

    manifest = read_manifest(folder / "m.yaml")

    assert manifest == read_manifest(folder / "m.toml")
    assert [job.name for job in manifest.jobs] == ["resnet18", "b"]
    assert [job.output.name for job in manifest.jobs] == ["resnet18_int8.onnx", "b_int8.onnx"]
    assert manifest.folder == folder / "quantized"


@pytest.mark.parametrize("pattern", ["models/**/*.onnx", "**/*.onnx", "m*/**/**/*.onnx"])
def test_two_stars_find_each_model_once_whatever_links_lead_back(folder, pattern):
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "elsewhere" / "deep" / "far.onnx").touch()
    models = folder / "models"
    (models / "z").mkdir()
    (models / "z" / "near.onnx").touch()
    for link, target in (("a", "z"), ("up", ".."), ("z/loop", ".."), ("out", "../elsewhere/deep")):
        (models / link).symlink_to(target)
    (models / "gone.onnx").symlink_to("nothing")

    manifest = check_manifest({"batch": {"input_dir": pattern, "output_dir": "out"}}, folder)

    # With the first folder among the stars, `elsewhere` has a path without a link.
    far = "elsewhere/deep" if pattern.startswith("**") else "models/out"
    names = ["models/b", "models/gone", "models/resnet18", "models/z/near", f"{far}/far"]
    found = sorted(str(job.input.relative_to(folder).with_suffix("")) for job in manifest.jobs)
    assert found == sorted(names)


def test_a_folder_has_models_with_names_of_windows_too(folder):
    (folder / "models/OLD.ONNX").touch()

    jobs = check_manifest({"batch": {"input_dir": "models", "output_dir": "out"}}, folder).jobs

    assert {job.input.name: job.output.name for job in jobs} == {
        "OLD.ONNX": "OLD_int8.onnx",
        "b.onnx": "b_int8.onnx",
        "resnet18.onnx": "resnet18_int8.onnx",
    }


def test_of_many_mistakes_the_first_are_shown_with_how_many_more_there_are(folder):
    absent = [{"input": f"{k}.onnx", "output": f"out/{k}.onnx"} for k in range(100)]

    found = mistakes({"models": absent}, folder)

    assert len(found) == 21
    assert found[-1] == "and 80 more"


def test_a_model_that_is_listed_is_not_taken_again_by_the_glob_that_finds_it(folder):
    """The example of quantize-rs: `models` lists what `input_dir` would find."""
    (folder / "models" / "b.onnx").rename(folder / "models" / "mobilenet.onnx")
    (folder / "m.yaml").write_text("""
bits: 8
per_channel: true
models:
  - {input: models/resnet18.onnx, output: quantized/resnet18_int8.onnx}
  - {input: models/mobilenet.onnx, output: quantized/mobilenet_int8.onnx}
batch: {input_dir: "models/*.onnx", output_dir: quantized/, skip_existing: true}
""")
    (folder / "m.toml").write_text("""
bits = 8
per_channel = true

[[models]]
input = "models/resnet18.onnx"
output = "quantized/resnet18_int8.onnx"

[[models]]
input = "models/mobilenet.onnx"
output = "quantized/mobilenet_int8.onnx"

[batch]
input_dir = "models/*.onnx"
output_dir = "quantized/"
skip_existing = true
""")

    manifest = read_manifest(folder / "m.yaml")

    assert manifest == read_manifest(folder / "m.toml")
    assert [(job.name, job.output.name) for job in manifest.jobs] == [
        ("resnet18", "resnet18_int8.onnx"),
        ("mobilenet", "mobilenet_int8.onnx"),
    ]


def test_a_model_overrides_every_option_key_by_key_and_its_contract_as_a_whole(folder):
    manifest = check_manifest(
        {
            "bits": 8,
            "method": "mse",
            "calibration": {"data": "data.npy", "num_samples": 5},
            "contract": {"metric": "agreement", "min": 0.9},
            "models": [
                {"input": "models/b.onnx", "output": "o/b.onnx"},
                {
                    "input": "models/resnet18.onnx",
                    "output": "o/r.onnx",
                    "bits": 4,
                    "exclude": ["/head/*"],
                    "calibration": {"num_samples": 7},
                    "contract": {"metric": "cosine", "max_drop": 0.1},
                },
            ],
        },
        folder,
    )

    first, second = manifest.jobs
    assert (first.config.bits, first.config.method, first.config.exclude) == (8, "mse", ())
    assert (second.config.bits, second.config.method, second.config.exclude) == (
        4,
        "mse",
        ("/head/*",),
    )
    assert first.calibration == SampleSpec(str(folder / "data.npy"), count=5)
    assert second.calibration == SampleSpec(str(folder / "data.npy"), count=7)
    assert second.contract == Contract("cosine", max_drop=0.1)


def test_all_mistakes_are_reported_together_each_with_its_path_and_what_would_be_right(folder):
    found = mistakes(
        {
            "bits": 7,
            "per_chanel": True,
            "models": [
                {
                    "input": "models/b.onnx",
                    "output": "o/b.onnx",
                    "contract": {"metric": "top11", "max_drop": "x"},
                },
                {"output": 3, "exclude": "foo", "layer_bits": {"head": 5}},
            ],
            "batch": {"jobs": 0},
            "limits": 3,
        },
        folder,
    )

    assert len(found) == 10
    assert "bits: is 7, not one of 8, 4 (Choose one of these)" in found
    assert "per_chanel: unknown key (Did you mean per_channel?)" in found
    [metric] = [line for line in found if line.startswith("models[0].contract.metric: is 'top11'")]
    assert metric.endswith("(Did you mean top1?)")
    assert "models[0].contract.max_drop: is 'x' (Must be a number or absent)" in found
    assert "models[1].input: is missing (Every model needs it)" in found
    assert "models[1].output: is 3 (Must be text)" in found


def test_what_is_wrong_in_form_does_not_hide_what_is_wrong_in_meaning(folder):
    top1 = {"contract": {"metric": "top1", "max_drop": 0.1}, "calibration": {"data": "data.npy"}}
    models = [
        {"input": "models/resnet81.onnx", "output": "o/r.onnx"},
        {"input": "models/missing.onnx", "output": 3},
        {"input": "models/b.onnx", "output": "o/b.onnx", **top1},
    ]

    in_a_model = mistakes({"models": models}, folder)
    in_all = mistakes({"models": models, "evaluation": {"data": 3}}, folder)

    reported = [line.partition(" (")[0].partition(": ")[::2] for line in in_a_model]
    assert [(place, problem.partition(":")[0]) for place, problem in reported] == [
        ("models[1].output", "is 3"),
        ("models[2].contract.metric", "top1 needs labels"),
        ("models[0].input", "no such file"),
    ]
    assert {line.partition(":")[0] for line in in_all} == {
        "models[1].output",
        "evaluation.data",
        "models[0].input",
    }


def test_files_that_are_missing_written_twice_or_overwritten_are_mistakes(folder):
    found = mistakes(
        {
            "models": [
                {"input": "models/resnet.onnx", "output": "o/r.onnx"},
                {
                    "input": "models/b.onnx",
                    "output": "o/b.onnx",
                    "calibration": {"data": "dat.npy"},
                    "name": "b",
                },
                {"input": "models/resnet18.onnx", "output": "models/../models/b.onnx"},
                {"input": "models/resnet18.onnx", "output": "o/b.onnx", "name": "b"},
            ]
        },
        folder,
    )

    assert any(
        "models[0].input: no such file" in line and "Did you mean resnet18.onnx?" in line
        for line in found
    )
    assert any(
        "models[1].calibration.data: no such file" in line and "data.npy" in line for line in found
    )
    assert any(line.startswith("models[2].output: is also an input") for line in found)
    assert any(
        line.startswith("models[3].output: is also the output of models[1]") for line in found
    )


def test_a_table_of_costs_is_named_from_the_manifests_folder_and_must_be_one(folder):
    batch = {"input_dir": "models", "output_dir": "o", "costs": "costs.jsonl"}

    assert check_manifest({"batch": batch}, folder).costs == folder / "costs.jsonl"
    (folder / "costs.jsonl").write_text("input: model.onnx\n")
    assert mistakes({"batch": batch}, folder)[0].startswith("batch.costs: holds no costs")
    assert mistakes({"batch": {**batch, "costs": "no/costs.jsonl"}}, folder)[0].startswith(
        "batch.costs: lies in no folder"
    )


def test_top1_without_labels_is_a_mistake_before_anything_runs(folder):
    models = [
        {
            "input": "models/b.onnx",
            "output": "o.onnx",
            "contract": {"metric": "top1", "max_drop": 0.1},
        }
    ]

    found = mistakes({"models": models, "evaluation": {"data": "data.npy"}}, folder)

    assert found == [
        "models[0].contract.metric: top1 needs labels"
        " (Give evaluation.labels, or promise agreement or cosine)"
    ]
    assert check_manifest(
        {"models": models, "evaluation": {"data": "data.npy", "labels": "labels.npy"}}, folder
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("bits: 8\nbits: 4\n", "'bits' is given twice"),
        ("[[[", "is not YAML"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("- 1", "is not a mapping"),
        ("", "is not a mapping"),
        ("models: []", "names no model"),
        ("batch: {input_dir: nothing, output_dir: o}", "no such file or folder: nothing"),
        ("batch: {input_dir: 'models/*.onx', output_dir: o}", "no .onnx file in models/*.onx"),
    ],
)
def test_a_text_that_is_no_manifest_is_refused_in_one_line(folder, text, problem):
    (folder / "m.yaml").write_text(text)

    with pytest.raises(RequestError, match=r"m\.yaml") as error:
        read_manifest(folder / "m.yaml")

    assert problem in str(error.value)


@pytest.mark.parametrize("output_dir", ["$HOME/out", "out/${DATE}", "out_${DATE}/a"])
def test_a_variable_in_a_path_is_refused_and_no_folder_of_its_name_appears(folder, output_dir):
    batch = {"input_dir": "models", "output_dir": output_dir}

    (found,) = mistakes({"batch": batch}, folder)

    assert found.startswith(f"batch.output_dir: is '{output_dir}' (Variables are not expanded")
    assert check_manifest({"batch": batch | {"output_dir": "out/c$h"}}, folder)


def test_a_glob_where_one_file_belongs_says_where_globs_stand(folder):
    models = [{"input": "models/*.onnx", "output": "out/a.onnx"}]
    values = {"models": models, "calibration": {"data": "*.npy"}}

    found = mistakes(values, folder)

    assert all(line.endswith("(Only batch.input_dir takes a glob)") for line in found)
    assert len(found) == 2


def test_a_name_in_braces_gives_each_model_its_own_data(folder):
    (folder / "data-b.npy").touch()

    manifest = check_manifest(
        {
            "batch": {"input_dir": "models/b.onnx", "output_dir": "o"},
            "calibration": {"data": "data-{name}.npy"},
        },
        folder,
    )

    assert manifest.jobs[0].calibration.source == str(folder / "data-b.npy")


def test_models_quantized_beside_their_originals_are_not_quantized_again(folder):
    (folder / "models/b_int8.onnx").touch()

    manifest = check_manifest({"batch": {"input_dir": "models", "output_dir": "models"}}, folder)

    assert [job.name for job in manifest.jobs] == ["b", "resnet18"]

    onnx.save(tiny_cnn(), folder / "models/b_int8.onnx")
    (found,) = mistakes({"batch": {"input_dir": "models", "output_dir": "models"}}, folder)
    assert "is also an input" in found


def test_what_quantize_made_beside_its_original_is_not_quantized_again(folder):
    for name in ("b_int4.onnx", "c_int8.onnx"):  # there is no c.onnx
        (folder / "models" / name).touch()

    manifest = check_manifest({"batch": {"input_dir": "models", "output_dir": "o"}}, folder)

    assert [job.name for job in manifest.jobs] == ["b", "c_int8", "resnet18"]


def test_a_manifest_survives_json_and_another_request_has_another_digest(folder):
    said = {
        "batch": {"input_dir": "models", "output_dir": "o", "costs": "costs.jsonl"},
        "calibration": {"data": "data.npy", "shape": {"x": [1]}},
    }

    manifest = check_manifest(said, folder)

    assert after_json(manifest.jobs) == manifest.jobs
    assert manifest.digest() == check_manifest(said, folder).digest()
    assert manifest.digest() != check_manifest({**said, "bits": 4}, folder).digest()


def test_models_of_one_stem_are_told_apart_by_their_folders(tmp_path):
    for name in ("bert", "gpt"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "model.onnx").touch()

    manifest = check_manifest(
        {"batch": {"input_dir": "models/**/*.onnx", "output_dir": "o"}}, tmp_path
    )

    assert [job.name for job in manifest.jobs] == ["bert/model", "gpt/model"]
    assert len({job.output for job in manifest.jobs}) == 2


def test_two_inputs_for_one_output_are_a_mistake_in_whatever_disguise(folder):
    (folder / "models/B.onnx").touch()
    (folder / "o").mkdir()
    (folder / "link").symlink_to("o")
    two = [
        {"input": "models/b.onnx", "output": "o/x.onnx"},
        {"input": "models/resnet18.onnx", "output": "link/x.onnx"},
    ]

    by_case = mistakes({"batch": {"input_dir": "models", "output_dir": "o"}}, folder)
    by_link = mistakes({"models": two}, folder)

    assert "B.onnx and" in by_case[0]
    assert by_link[0].startswith("models[1].output: is also the output of models[0]")


@pytest.mark.parametrize("other", ["s3a://b/x.onnx", "s3://b//x.onnx", "S3://b/x.onnx"])
def test_two_urls_of_one_output_are_a_mistake(folder, other):
    two = [
        {"input": "models/b.onnx", "output": "s3://b/x.onnx"},
        {"input": "models/resnet18.onnx", "output": other},
    ]

    assert "is also the output of models[0]" in mistakes({"models": two}, folder)[0]


@pytest.mark.parametrize("output", ["data.npy", "m.yaml", "models/", "."])
def test_an_output_that_is_no_model_would_replace_other_files(folder, output):
    models = [{"input": "models/b.onnx", "output": output}]

    (found,) = mistakes({"models": models, "calibration": {"data": "data.npy"}}, folder)

    assert found.startswith(f"models[0].output: is '{output}' (Name a file, ending in .onnx)")


def test_what_cannot_be_read_is_a_job_unless_nothing_else_is_left(folder):
    (folder / "models/gone.onnx").symlink_to("nowhere")
    (folder / "models/circle.onnx").symlink_to("circle.onnx")
    (folder / "models/device.onnx").symlink_to("/dev/null")
    (folder / "models/stray.onnx").mkdir()
    (folder / "models/._b.onnx").touch()
    batch = {"input_dir": "models", "output_dir": "o"}

    for pattern in ("models", "models/*.onnx"):
        found = check_manifest({"batch": {**batch, "input_dir": pattern}}, folder).jobs
        wrong = {job.name: unreadable_file(job) for job in found}
        assert wrong.pop("gone").problem == "is a link to nothing"
        assert wrong.pop("circle").problem == "too many levels of symbolic links"
        assert wrong.pop("device").problem == "is no regular file"
        assert wrong.pop("stray").problem == "is a folder, not a file"
        assert wrong == {"b": None, "resnet18": None}

    models = [{"input": "models/gone.onnx", "output": "o/g.onnx"}]
    assert "is a link to nothing" in mistakes({"models": models}, folder)[0]


def test_an_output_of_an_earlier_run_is_no_original_and_another_batch_may_not_write_it(folder):
    output = folder / "models/b_int4.onnx"
    output.touch()
    for name in ("mine", "other"):
        (folder / name / ".quantmill").mkdir(parents=True)
        (folder / name / ".quantmill" / "journal.jsonl").touch()
    mine, other = Owner(str(folder / "mine")), Owner(str(folder / "other"))

    claim(output, mine)
    claim(output, mine)
    jobs = check_manifest({"batch": {"input_dir": "models", "output_dir": "models"}}, folder).jobs

    assert [job.name for job in jobs] == ["b", "resnet18"]
    with pytest.raises(RequestError, match="output of another batch"):
        claim(output, other)
    claim(output, other, take_over=True)
    assert read_owner(output) == other


def test_a_claim_waits_for_one_that_is_being_written_and_makes_up_for_one_that_was_not(folder):
    output, mine = folder / "out.onnx", Owner(str(folder / "mine"))
    other = Owner(str(folder / "other"))
    (folder / "other" / ".quantmill").mkdir(parents=True)
    (folder / "other" / ".quantmill" / "journal.jsonl").touch()
    claim(output, other)
    (record,) = (folder / ".quantmill" / "outputs").iterdir()
    content = record.read_bytes()
    record.write_bytes(b"")

    with ThreadPoolExecutor(1) as beside, record.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        claiming = beside.submit(claim, output, mine)
        file.write(content)
        file.close()
        with pytest.raises(RequestError, match="output of another batch"):
            claiming.result()
    record.write_bytes(b"")  # its writer was killed
    claim(output, mine)

    assert read_owner(output) == mine
    assert [path.name for path in record.parent.iterdir()] == [record.name]


def test_a_record_that_cannot_be_written_leaves_no_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            claim(tmp_path / "made.onnx", Owner("folder"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_label_of_a_job_names_its_output(folder):
    models = [{"input": "models/b.onnx", "output": f"o/{name}.onnx"} for name in ("one", "two")]

    jobs = check_manifest({"models": models}, folder).jobs

    assert [job.label for job in jobs] == ["b (one)", "b (two)"]


def test_an_output_whose_name_is_too_long_is_never_claimed(folder):
    output = folder / ("y" * 256)

    with pytest.raises(RequestError, match="name of 256 bytes is too long"):
        claim(output, Owner(str(folder)))


def test_no_similar_name_is_looked_for_in_a_folder_of_thousands(tmp_path):
    for k in range(MOST_NAMES + 1):
        (tmp_path / f"m{k}.onnx").touch()

    (found,) = mistakes({"models": [{"input": "m.onnx", "output": "o/m.onnx"}]}, tmp_path)

    assert found.startswith("models[0].input: no such file")
    assert "Did you mean" not in found
