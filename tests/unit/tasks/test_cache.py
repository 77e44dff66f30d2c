"""The local cache of stores: each content once, by its digest, and never a torn or stale one."""

from __future__ import annotations

import fsspec
import numpy as np
import onnx
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from quant_core.errors import RequestError
from tasks import store_requests, stores
from tasks.cache import Cache, host_cache
from tasks.contents import file_digest
from tasks.locations import Url
from tests.models import save_apart, tiny_cnn

STORE = Url("memory://cached")


@pytest.fixture
def cache(tmp_path):
    yield Cache(tmp_path / "cache")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def downloads(monkeypatch):
    """The URLs that are read, in order."""
    read, download = [], stores.download

    def note(url, path, limit_s, **options):
        read.append(url)
        download(url, path, limit_s, **options)

    monkeypatch.setattr(stores, "download", note)
    return read


def save(tmp_path, name="m.onnx", seed=0):
    """A model in the store whose weights are in another file."""
    local = tmp_path / "local"
    local.mkdir(exist_ok=True)
    data = f"{name}.data"
    save_apart(tiny_cnn(seed=seed), local / name, data)
    for file in (name, data):
        stores.upload(local / file, STORE / file, 60.0)
    return local / name


def test_a_model_is_placed_with_its_external_data(cache, tmp_path):
    local = save(tmp_path)

    content = cache.model(STORE / "m.onnx")
    cache.place(content, tmp_path / "placed")

    assert list(content.files) == ["m.onnx", "m.onnx.data"]
    assert content.files["m.onnx"] == [local.stat().st_size, file_digest(local)]
    for name in content.files:
        placed = tmp_path / "placed" / name
        assert placed.read_bytes() == local.with_name(name).read_bytes()


def test_external_data_outside_of_the_folder_is_not_fetched(cache, downloads):
    entry = onnx.StringStringEntryProto(key="location", value="../secret")
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    tensor.external_data.append(entry)
    model = onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor]))
    stores.write(STORE / "models" / "m.onnx", model.SerializeToString())
    stores.write(STORE / "secret", b"secret")

    content = cache.model(STORE / "models" / "m.onnx")

    assert list(content.files) == ["m.onnx"]
    assert downloads == [STORE / "models" / "m.onnx"]


def test_a_file_is_read_again_only_when_the_store_says_that_it_is_another_one(
    cache, tmp_path, downloads
):
    stores.write(STORE / "data.npy", b"first")
    first = cache.digest(STORE / "data.npy")
    assert Cache(tmp_path / "cache").digest(STORE / "data.npy") == first
    assert len(downloads) == 1

    stores.write(STORE / "data.npy", b"other")

    assert Cache(tmp_path / "cache").digest(STORE / "data.npy") != first
    assert len(downloads) == 2


def test_what_was_just_written_is_known_without_reading_it(cache, tmp_path, downloads):
    local = save(tmp_path)
    file = [local.stat().st_size, file_digest(local)]

    cache.remember(STORE / "m.onnx", file)

    assert cache.digest(STORE / "m.onnx") == file
    assert not downloads
    assert list(cache.model(STORE / "m.onnx").files) == ["m.onnx", "m.onnx.data"]


def test_a_file_that_changes_while_it_is_read_is_read_again(cache, monkeypatch):
    stores.write(STORE / "data.npy", b"first")
    download, versions = stores.download, [b"second", b"third"]

    def change(url, path, limit_s):
        download(url, path, limit_s)
        if versions:
            stores.write(url, versions.pop(0))

    monkeypatch.setattr(stores, "download", change)

    size, digest = cache.digest(STORE / "data.npy")

    assert size == len(b"third")
    assert (cache.root / "files" / digest).read_bytes() == b"third"


def test_a_folder_of_samples_is_its_arrays(cache, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(1))
    for name in ("b.npz", "a.npz", ".hidden.npz"):
        stores.upload(tmp_path / "a.npz", STORE / "samples" / name, 60.0)
    stores.write(STORE / "samples" / "README", b"text")

    content = cache.samples(STORE / "samples")

    assert (content.folder, content.name) == (STORE / "samples", "")
    assert list(content.files) == ["a.npz", "b.npz"]


def test_a_torn_content_is_fetched_again(cache, tmp_path):
    local = save(tmp_path)
    content = cache.model(STORE / "m.onnx")
    kept = cache.root / "files" / content.files["m.onnx"][1]
    kept.write_bytes(b"x" * kept.stat().st_size)

    cache.place(content, tmp_path / "placed")

    assert (tmp_path / "placed" / "m.onnx").read_bytes() == local.read_bytes()


def test_what_changed_since_the_batch_began_is_not_taken_for_it(cache, tmp_path):
    save(tmp_path)
    content = cache.model(STORE / "m.onnx")
    (cache.root / "files" / content.files["m.onnx"][1]).unlink()
    save(tmp_path, seed=1)

    with pytest.raises(OSError, match="has changed since the batch began"):
        cache.place(content, tmp_path / "placed")


def test_a_file_that_the_store_shows_late_is_waited_for(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(store_requests, "FIRST_PAUSE_S", 0.001)
    local = save(tmp_path)
    content = cache.model(STORE / "m.onnx")
    for path in (cache.root / "files").iterdir():
        path.unlink()
    late, get_file = iter([True, True]), MemoryFileSystem.get_file

    def shows_late(*args, **options):
        if next(late, False):
            raise FileNotFoundError
        return get_file(*args, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", shows_late)
    cache._each = lambda call, items: [call(item) for item in items]

    (tmp_path / "placed").mkdir()
    cache.place(content, tmp_path / "placed")

    assert (tmp_path / "placed" / "m.onnx").read_bytes() == local.read_bytes()


def test_what_was_written_and_is_not_shown_yet_is_read_when_it_is(cache, tmp_path, downloads):
    cache.remember(STORE / "m.onnx", [5, "digest"])
    local = save(tmp_path)

    assert cache.digest(STORE / "m.onnx")[1] == file_digest(local)
    assert STORE / "m.onnx" in downloads


def test_contents_that_were_used_longest_ago_go_first(cache, tmp_path, monkeypatch):
    cache.contents.max_bytes = 250
    names = [f"{k}.npy" for k in range(3)]
    for name in names:
        stores.write(STORE / name, name.encode() * 20)  # 100 bytes
    digests = [cache.digest(STORE / name)[1] for name in names[:2]]
    cache.place(cache.samples(STORE / names[0]), tmp_path / "used")

    digests.append(cache.digest(STORE / names[2])[1])

    left = {path.name for path in (cache.root / "files").iterdir()}
    assert left == {digests[0], digests[2]}
    assert (tmp_path / "used" / names[0]).exists()


def test_a_spoiled_note_is_passed_over(cache):
    stores.write(STORE / "data.npy", b"content")
    first = cache.digest(STORE / "data.npy")
    for note in (cache.root / "known").iterdir():
        note.write_text('{"url": 1}')

    assert Cache(cache.root).digest(STORE / "data.npy") == first


def test_work_folders_of_killed_processes_are_deleted(cache, monkeypatch):
    monkeypatch.setattr("tasks.contents.STRAY_S", -1.0)
    stray = cache.root / "work" / "stray"
    stray.mkdir()

    with cache.contents.work_folder() as held, cache.contents.work_folder():
        assert held.is_dir()
        assert not stray.exists()

    assert not list((cache.root / "work").iterdir())


def test_a_folder_is_listed_once_for_many_of_its_files(cache, monkeypatch):
    urls = [STORE / "many" / f"{k}.npy" for k in range(20)] + [STORE / "few" / "a.npy"]
    for url in urls:
        stores.write(url, b"content")
    read, stat = [], stores.stat

    def note(url):
        read.append(url)
        return stat(url)

    monkeypatch.setattr(stores, "stat", note)

    cache.stat_all([*urls, STORE / "many" / "missing.npy"])

    assert {cache.stat(url).size for url in urls} == {len(b"content")}
    assert read == [STORE / "few" / "a.npy"]
    cache.forget()
    cache.stat(urls[0])
    assert read[1:] == urls[:1]


def test_a_named_cache_that_cannot_be_written_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUANTMILL_CACHE", str(tmp_path / "file" / "cache"))

    with pytest.raises(RequestError, match="cannot be written: not a directory"):
        host_cache.__wrapped__()
