"""Files in stores: what fsspec's clients do and raise, in the words of local files."""

from __future__ import annotations

import errno
import time

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from quant_core.errors import RequestError
from tasks import remote, store_requests, stores
from tasks.cache import Cache
from tasks.locations import Url, is_url, location
from tasks.remote import transfer
from tasks.store_requests import request
from tasks.stores import check_url


class Shelf(LocalFileSystem):
    """A store that has folders, and in which a file that is being written can be seen."""

    protocol = "shelf"
    local_file = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("shelf://"))


@pytest.fixture(params=["memory", "shelf"])
def folder(request, tmp_path):
    """An empty folder in a store of each kind."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    yield Url(f"{request.param}://{tmp_path}/store")
    fsspec.filesystem("memory").store.clear()


def test_a_url_has_the_parts_of_a_path():
    url = Url("s3://bucket/models/a.b.onnx")

    assert (url.name, url.stem, url.suffix) == ("a.b.onnx", "a.b", ".onnx")
    assert url.parent / "out" / "m.onnx" == Url("s3://bucket/models/out/m.onnx")
    assert str(url.relative_to(Url("s3://bucket"))) == "models/a.b.onnx"
    assert url.parent.parent == url.parent.parent.parent == Url("s3://bucket")


@pytest.mark.parametrize(
    ("text", "is_in_store"),
    [("s3://b/m.onnx", True), ("models/m.onnx", False), ("file:///m.onnx", False), ("C:/m", False)],
)
def test_a_url_of_a_local_file_is_a_path(text, is_in_store):
    assert is_url(text) == is_in_store
    assert isinstance(location(text), Url) == is_in_store


def test_the_scheme_of_a_url_is_written_in_either_case():
    assert location("S3://Bucket/M.onnx") == Url("s3://Bucket/M.onnx")


def test_a_file_url_names_the_local_file():
    assert str(location("file:///models/m.onnx")) == "/models/m.onnx"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("sftp://me:pass-word@host/m.onnx", "holds a password"),
        ("https://pass-word@host/m.onnx", "holds a password"),
        ("https://host/m.onnx?signature=pass-word", "holds a query"),
        ("https://host/m.onnx#pass-word", "holds a query"),
        ("s3://bucket/m.onnx?X-Amz-Signature=pass-word", "holds a query"),
        ("az://container/m.onnx?sv=2024&sig=pass-word", "holds a query"),
        ("no-such-store://b/m.onnx", "no file system is called no-such-store"),
        ("s3://bucket/models/../m.onnx", "no folder . or .."),
        ("zip://m.onnx::s3://bucket/models.zip", "One URL"),
    ],
)
def test_a_url_with_a_secret_or_of_an_unknown_store_is_refused(url, problem):
    with pytest.raises(RequestError) as error:
        check_url(url)

    assert problem in str(error.value)
    assert "pass-word" not in str(error.value)


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch):
    def missing(scheme):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)

    with pytest.raises(RequestError, match=r'pip install "quantmill\[gs\]"'):
        check_url("gs://bucket/m.onnx")


def test_files_are_written_listed_and_read(folder, tmp_path):
    (tmp_path / "local").write_bytes(b"content")

    stores.upload(tmp_path / "local", folder / "sub" / "a.onnx", 60.0)
    stores.copy(folder / "sub" / "a.onnx", folder / "b.onnx", 60.0)
    stores.download(folder / "b.onnx", tmp_path / "back", 60.0)

    assert (tmp_path / "back").read_bytes() == stores.read(folder / "b.onnx") == b"content"
    assert {url: stat.is_folder for url, stat in stores.listing(folder).items()} == {
        folder / "b.onnx": False,
        folder / "sub": True,
    }
    both = {folder / "b.onnx", folder / "sub" / "a.onnx"}
    assert set(stores.tree(folder)) == set(stores.matches(folder / "**/*.onnx", folder)) == both
    stores.remove(folder)
    stores.remove(folder)
    assert stores.tree(folder) == {}


@pytest.mark.parametrize(
    "key",
    ["a b%20c#d.onnx", "a?b.onnx", "[1]*.onnx", "A.onnx", "a.onnx", "\u00e9.onnx", "e\u0301.onnx",
     "end.", "a::b.onnx", "k" * 255],
)  # fmt: skip
def test_a_key_is_a_name_whatever_is_in_it(key, tmp_path):
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    folder = Url(f"shelf://{tmp_path}/store")

    stores.write(folder / key, b"content")

    assert list(stores.tree(folder)) == list(stores.listing(folder)) == [folder / key]
    assert stores.read(folder / key) == b"content"
    assert (folder / key).relative_to(folder).name == key


@pytest.mark.skipif(
    tuple(map(int, fsspec.__version__.split(".")[:2])) < (2026, 7),
    reason="the memory store of this fsspec takes an empty part for a folder",
)
def test_a_key_with_an_empty_part_is_another_one_than_without_it():
    folder = Url("memory://empty_parts")
    keys = [folder / "sub//m.onnx", folder / "sub/m.onnx", folder / "/m.onnx"]
    for number, url in enumerate(keys):
        stores.write(url, bytes([number]))

    assert set(stores.tree(folder)) == set(keys)
    assert [stores.read(url.parent / url.name) for url in keys] == [b"\0", b"\1", b"\2"]


def test_an_upload_that_fails_leaves_the_file_as_it_was(folder, tmp_path):
    stores.write(folder / "m.onnx", b"before")

    with pytest.raises(FileNotFoundError):
        stores.upload(tmp_path / "missing", folder / "m.onnx", 60.0)

    assert stores.read(folder / "m.onnx") == b"before"


def test_a_file_is_created_once(folder):
    stores.create(folder / "record", b"first")

    with pytest.raises(FileExistsError):
        stores.create(folder / "record", b"second")

    assert stores.read(folder / "record") == b"first"


def test_another_content_has_another_identity(folder):
    stores.write(folder / "m.onnx", b"one")
    first, listed = stores.stat(folder / "m.onnx"), stores.listing(folder)[folder / "m.onnx"]
    time.sleep(0.01)  # stores without tags tell contents of one size by their times
    stores.write(folder / "m.onnx", b"two")

    assert first == listed
    assert stores.stat(folder / "m.onnx").identity != first.identity


def test_a_store_that_copies_nothing_gets_the_file_through_this_host(tmp_path, monkeypatch):
    def cp_file(*args, **kwargs):
        raise NotImplementedError

    folder = Url("memory://copies_nothing")
    monkeypatch.setattr(MemoryFileSystem, "cp_file", cp_file)
    monkeypatch.setattr(remote, "host_cache", lambda: Cache(tmp_path / "cache"))
    stores.write(folder / "m.onnx", b"model")

    transfer(folder / "m.onnx", folder / "out" / "m.onnx", 60.0)

    assert stores.read(folder / "out" / "m.onnx") == b"model"


def test_an_error_names_the_url(folder):
    with pytest.raises(FileNotFoundError) as error:
        stores.stat(folder / "m.onnx")

    assert error.value.filename == str(folder / "m.onnx")


class Flaky:
    """A call of a store's client that is busy so many times."""

    def __init__(self, times: int, problem: Exception) -> None:
        self.times, self.problem, self.calls = times, problem, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.problem
        return "answer"


@pytest.mark.parametrize("problem", [OSError(errno.EBUSY, "slow down"), RuntimeError("no route")])
def test_a_busy_store_is_asked_again(problem, monkeypatch):
    monkeypatch.setattr(store_requests, "FIRST_PAUSE_S", 0.001)

    assert request(Url("s3://b/m"), Flaky(3, problem)) == "answer"


class NoCredentialsError(Exception):
    """As botocore has one; the clients of other stores name theirs likewise."""


@pytest.mark.parametrize(
    "problem", [PermissionError("no"), OSError(errno.EINVAL, "no"), NoCredentialsError("no")]
)
def test_a_store_that_refuses_is_not_asked_again(problem):
    call = Flaky(1, problem)

    with pytest.raises(OSError, match=r"no|refuses"):
        request(Url("s3://b/m"), call)

    assert call.calls == 1


@pytest.mark.parametrize(
    "problem",
    [
        PermissionError("The key has expired"),
        FileNotFoundError("The bucket of the key has expired"),
    ],
)
def test_the_reason_of_a_store_is_passed_on_where_its_kind_does_not_say_all(problem):
    with pytest.raises(type(problem), match="has expired"):
        request(Url("s3://b/m"), Flaky(1, problem))


def test_a_store_that_stays_busy_fails_in_its_own_words(monkeypatch):
    monkeypatch.setattr(store_requests, "RETRY_S", 0.0)
    problem = RuntimeError("http://me:pass-word@host/m?token=pass-word: connection lost\ndetails")

    with pytest.raises(OSError, match="connection lost") as error:
        request(Url("s3://b/m"), Flaky(9, problem))

    assert "pass-word" not in str(error.value)
    assert error.value.filename == "s3://b/m"


class EndpointConnectionError(Exception):
    """As botocore has one."""


def test_a_store_that_has_never_answered_is_soon_given_up_and_no_other_one(monkeypatch):
    monkeypatch.setattr(store_requests, "_SILENT_SINCE", {})
    monkeypatch.setattr(store_requests, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(store_requests, "FIRST_S", 0.0)
    call = Flaky(3, EndpointConnectionError("http://host"))

    with pytest.raises(OSError, match="the store cannot be reached: http://host"):
        request(Url("s3://b/m"), call)

    assert call.calls == 1
    assert request(Url("s3://c/m"), Flaky(3, OSError(errno.EIO, "503"))) == "answer"
    assert request(Url("s3://c/n"), Flaky(3, EndpointConnectionError("http://host"))) == "answer"


def test_a_store_that_never_answers_ends_with_the_time_limit():
    with pytest.raises(TimeoutError, match="did not answer within 0 s"):
        request(Url("s3://b/m"), lambda: time.sleep(60), limit_s=0.05)
