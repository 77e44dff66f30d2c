"""A manifest is data: nothing in it runs, unfolds without end, or is waited for."""

from __future__ import annotations

import os
import threading

import pytest

from flows.manifest.parse import MAX_BYTES
from flows.manifest.read import read_manifest
from quant_core.errors import RequestError

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 30)
)
CASES = {
    "a_program.yaml": (
        "a: !!python/object/apply:os.system ['touch ran']",
        "could not determine a constructor",
    ),
    "a_module.yaml": ("a: !!python/module:antigravity x", "could not determine a constructor"),
    "a_billion_laughs.yaml": (LAUGHS, "unfold to more than"),
    "a_list_of_itself.yaml": ("&a [*a]", "unfold to more than"),
    "a_merge_of_merges.yaml": (
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 40)),
        "unfold to more than",
    ),
    "no_number.yaml": ('bits: !!int ""', "is not YAML"),
    "no_date.yaml": ("bits: !!timestamp soon", "is not YAML"),
    "a_huge_number.yaml": ("calibration: {seed: 0x" + "f" * 20_000 + "}", "more than 64 bits"),
    "half_a_character.yaml": ('models: [{input: "\\ud800"}]', "surrogates"),
    "a_pit.yaml": ("[" * 100_000, "nested too deep"),
    "nobody_s_home.yaml": ("models: [{input: ~nobody-at-all/a, output: o}]", "no such user"),
    "a_long_name.yaml": ("models: [{input: " + "a" * 5000 + ", output: o}]", "models[0].input"),
    "a_pit.toml": ("a = " + "[" * 100_000, "nested too deep"),
    "a_long_key.toml": ("a." * 400_000 + "a = 1", "more than 16 parts"),
    "a_long_key_in_quotes.toml": ("x = {" + '"a" . ' * 400_000 + "a = 1}", "more than 16 parts"),
    "a_huge_number.toml": ("bits = 0x" + "f" * 20_000, "more than 64 bits"),
    "too_much.yaml": ("#" * (MAX_BYTES + 1), "larger than 8 MB"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_manifest_is_a_wrong_request(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, message = CASES[name]
    (tmp_path / name).write_text(text)

    with pytest.raises(RequestError) as error:
        read_manifest(tmp_path / name)

    assert message in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_manifest_may_be_a_pipe_and_only_its_first_megabytes_are_read(tmp_path):
    os.mkfifo(tmp_path / "m.yaml")

    def write() -> None:
        with (tmp_path / "m.yaml").open("wb") as pipe:
            pipe.write(b"#" * (MAX_BYTES + 1))

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(RequestError, match="larger than 8 MB"):
        read_manifest(tmp_path / "m.yaml")
    writer.join()


def test_samples_are_files_and_folders_not_pipes_and_devices(tmp_path):
    (tmp_path / "m.onnx").touch()
    os.mkfifo(tmp_path / "pipe.npy")
    for data in ("pipe.npy", "/dev/zero"):
        text = f"models: [{{input: m.onnx, output: o.onnx, calibration: {{data: {data}}}}}]"
        (tmp_path / "m.yaml").write_text(text)

        with pytest.raises(RequestError, match="is no regular file"):
            read_manifest(tmp_path / "m.yaml")
