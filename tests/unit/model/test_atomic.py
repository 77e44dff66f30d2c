"""A file appears with all of its content, or stays as it was."""

from pathlib import Path

import pytest

from quant_core.model.atomic import atomic_write, check_replaceable, make_own_folder, overwrite


@pytest.mark.parametrize("survives_power_cut", [True, False])
def test_content_appears_when_the_block_ends(tmp_path, survives_power_cut):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with atomic_write(path, survives_power_cut) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"

    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def write_half(path):
    with atomic_write(path) as stream:
        stream.write(b"ne")
        raise KeyError


def test_a_block_that_raises_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    with pytest.raises(KeyError):
        write_half(path)

    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_overwritten_in_its_own_blocks_or_stays_as_it_was(tmp_path):
    path = tmp_path / "summary.json"
    with atomic_write(path) as stream:
        stream.write(b"a longer content than the next one")
    room_bytes = 512 * path.stat().st_blocks

    overwrite(path, b"short")
    assert path.read_bytes() == b"short"

    with pytest.raises(OSError, match=r"[Nn]o space left") as error:
        overwrite(path, bytes(room_bytes + 1))
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"short"


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/new.onnx"])
def test_a_device_is_never_replaced(path):
    with pytest.raises(OSError, match="is no regular file"):
        check_replaceable(Path(path))


@pytest.mark.parametrize("spoiled", ["cache", "cache/digest"])
def test_a_file_in_the_place_of_an_own_folder_is_deleted(tmp_path, spoiled):
    (tmp_path / spoiled).parent.mkdir(exist_ok=True)
    (tmp_path / spoiled).touch()
    (tmp_path / "other").touch()

    make_own_folder(tmp_path / "cache" / "digest")

    assert (tmp_path / "cache" / "digest").is_dir()
    assert (tmp_path / "other").exists()
