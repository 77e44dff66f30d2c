"""The answers of a model's stages, kept until it is finished: a killed run goes on from them."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_core.model.atomic import atomic_write, discard, make_own_folder
from quant_core.text import digest_of
from tasks import stores
from tasks.cache import files_digest
from tasks.locations import Location, Url

FILES = {  # which files of a model's folder each stage writes
    "prepare": ("prepared.onnx*", "plan.json"),
    "calibrate": ("stats-*.npz",),
    "quantize": ("out/*",),
}


class StageAnswers:
    """The answers of the stages of one model so far, and the folder that holds their files.

    An answer is kept with the digests of the files that its stage wrote, and with one of itself. It
    is used again only while they hold: a power cut may tear a file whose answer is whole.

    folder  of the answers
    files   the folder of what stages write: the same one, or one that workers reach in a store
    """

    def __init__(self, folder: Path, files: Location) -> None:
        self.folder, self.files = folder, files
        make_own_folder(folder)

    def answer(self, stage: str) -> Any:
        """The answer of that stage, None if it has not answered or its files are not whole."""
        try:
            answer, files = self._kept(stage)
            return answer if self._are_whole(files) else None
        except (OSError, ValueError):
            return None

    def begin(self, stage: str) -> None:
        """Delete what an earlier attempt at a stage has left. Raises: OSError if it cannot be."""
        for path in (self.folder / f"{stage}.json", *self._paths(stage)):
            discard(path)

    def keep(self, stage: str, answer: object) -> None:
        """Write the answer of a stage. The file appears as a whole, or not at all."""
        if isinstance(self.files, Url):
            files = answer.get("files", {}) if isinstance(answer, Mapping) else {}
        else:
            files = files_digest(self.folder, self._files(stage))
        kept = {"answer": answer, "files": files, "digest": _digest([answer, files])}
        # What a power cut tears is not read as an answer, and its stage runs again.
        with atomic_write(self.folder / f"{stage}.json", survives_power_cut=False) as file:
            file.write(json.dumps(kept).encode())

    def made(self) -> dict[str, list[Any]]:
        """The files that `quantize` wrote, with size and digest.

        Raises: OSError if they are not what it wrote.
        """
        where = str(self.files / "out")
        try:
            _, known = self._kept("quantize")
        except ValueError:
            raise OSError(errno.EIO, "the answer is not what the stage gave", where) from None
        if not self._are_whole(known):
            raise OSError(errno.EIO, "the file is not what the stage wrote", where)
        return {Path(name).name: file for name, file in known.items()}

    def forget(self) -> None:
        """Delete all answers."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(self.files, Url):
            with contextlib.suppress(OSError):
                stores.remove(self.files)

    def _are_whole(self, known: Mapping[str, Sequence[Any]]) -> bool:
        """Whether the files that a stage wrote are still there, and the same."""
        if not isinstance(self.files, Url):
            return files_digest(self.folder, list(known)) == known
        # A store tears no file, and whoever fetches one compares its digest.
        there = stores.tree(self.files) if known else {}
        sizes = {name: there.get(self.files / name) for name in known}
        return all(stat and stat.size == known[name][0] for name, stat in sizes.items())

    def _kept(self, stage: str) -> tuple[Any, dict[str, list[Any]]]:
        """The answer of a stage and its files. Raises: OSError; ValueError for a torn answer."""
        try:
            kept = json.loads((self.folder / f"{stage}.json").read_text(encoding="utf-8"))
            answer, files, digest = kept["answer"], kept["files"], kept["digest"]
        except (KeyError, TypeError, RecursionError) as problem:
            raise ValueError("is no answer of a stage") from problem
        if _digest([answer, files]) != digest:
            raise ValueError("is not the answer that the stage gave")
        return answer, files

    def _files(self, stage: str) -> list[str]:
        """The files that a stage has written, relative to the folder."""
        files = (path for path in self._paths(stage) if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def _paths(self, stage: str) -> list[Path]:
        return [path for pattern in FILES.get(stage, ()) for path in self.folder.glob(pattern)]


def _digest(values: Any) -> str:
    return digest_of(json.dumps(values).encode())
