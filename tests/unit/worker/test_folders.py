"""What a host has for each user: a temporary folder of their own."""

from __future__ import annotations

import os
import tempfile

import pytest

from quant_core.worker.folders import OWN_NAMES, own_folder


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_an_own_folder_is_found_again_and_is_for_its_user_alone(temporary):
    folder = own_folder()

    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert own_folder() == folder


@pytest.mark.parametrize("what", ["file", "link to a folder", "link to nothing"])
def test_what_others_put_in_its_place_is_left_for_another_name(temporary, what):
    place = temporary / f"quantmill-{os.getuid()}"
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    if what == "file":
        place.touch()
    else:
        place.symlink_to(elsewhere if what == "link to a folder" else "nothing")

    folder = own_folder()

    assert folder != place
    assert folder.is_dir()
    assert own_folder() == folder
    assert not list(elsewhere.iterdir())


def test_a_folder_of_another_user_is_left_for_another_name(temporary, monkeypatch):
    """All is owned by who runs the test: for anybody else it is another user's."""
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)

    with pytest.raises(PermissionError, match="somebody else"):
        own_folder()

    assert len(list(temporary.iterdir())) == OWN_NAMES


def test_an_own_folder_is_an_error_where_others_hold_all_its_names(temporary):
    first = temporary / f"quantmill-{os.getuid()}"
    for k in range(OWN_NAMES):
        (first.with_name(f"{first.name}-{k}") if k else first).touch()

    with pytest.raises(PermissionError, match="somebody else"):
        own_folder()
