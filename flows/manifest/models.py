"""Which models a manifest means: those it lists, what a folder or a glob matches, or the graphs of
one model of Hugging Face.
"""

from __future__ import annotations

import glob
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.manifest import huggingface
from flows.manifest.mistakes import Mistake, Place
from flows.manifest.paths import absolute, is_folder, real_path
from quant_core.errors import reason_of
from tasks.cache import host_cache
from tasks.locations import MODELS, Location, Url, is_model


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that the manifest names.

    place    the key in the manifest that names it
    options  the options of this model alone
    root     the folder below which the output has the same place as the input; None: there is none
    graph    the graph of a model of several that it is; None: it is a model of its own
    """

    place: Place
    input: Location
    options: Mapping[str, Any]
    root: Location | None = None
    graph: huggingface.Graph | None = None


def find_models(values: Mapping[str, Any], folder: Path) -> tuple[list[Entry], list[Mistake]]:
    """What `models` lists and `batch.input_dir` matches."""
    entries = [
        Entry(("models", index), absolute(folder, model["input"]), model)
        for index, model in enumerate(values.get("models") or [])
        if model is not None
    ]
    batch = values.get("batch") or {}
    pattern = batch.get("input_dir")
    if not pattern:
        return entries, []
    if not batch.get("output_dir"):
        hint = "Where are the models of input_dir to go?"
        return [], [Mistake(("batch", "output_dir"), "is missing", hint)]
    place = ("batch", "input_dir")
    if batch.get("layout"):
        return _find_graphs(entries, place, absolute(folder, pattern))
    try:
        matches = _glob(folder, pattern)
    except OSError as problem:
        return entries, [_not_listed(place, problem)]
    if not matches:
        path = absolute(folder, pattern)
        is_there = isinstance(path, Url) or glob.has_magic(pattern) or is_folder(path)
        flaw = "no .onnx file in" if is_there else "no such file or folder:"
        return entries, [Mistake(place, f"{flaw} {pattern}", f"Looked in {path}")]
    listed = {real_path(entry.input) for entry in entries}
    found = [
        Entry(place, path, {}, root) for path, root in matches if real_path(path) not in listed
    ]
    return entries + found, []


def _find_graphs(
    listed: list[Entry], place: Place, root: Location
) -> tuple[list[Entry], list[Mistake]]:
    """What `models` lists, and the graphs of a folder of Hugging Face."""
    if isinstance(root, Path) and not is_folder(root):
        hint = "layout: huggingface takes the folder of one model, with its config.json"
        return listed, [Mistake(place, f"is no folder: {root}", hint)]
    try:
        graphs = huggingface.find_graphs(root)
    except OSError as problem:
        return listed, [_not_listed(place, problem)]
    if not graphs:
        return listed, [Mistake(place, f"no .onnx file in {root}", "Export the model first")]
    return listed + [Entry(place, graph.input, {}, root, graph) for graph in graphs], []


def _not_listed(place: Place, problem: OSError) -> Mistake:
    return Mistake(place, f"cannot be listed: {reason_of(problem)}", str(problem.filename))


def _glob(folder: Path, pattern: str) -> list[tuple[Location, Location]]:
    """Each model that a folder or glob names, with the folder that its place is relative to.

    What cannot be read, such as a link to nothing, is found too: it becomes a failed row. Names
    that start with a dot are found only by a glob that starts with one.

    Raises: OSError if a store cannot be listed.
    """
    path = absolute(folder, pattern)
    if isinstance(path, Url):
        return _glob_in_store(path)
    if path.is_dir():
        names = sorted(path.glob(MODELS))
        return [(model, path) for model in names if not model.name.startswith(".")]
    root = path
    while glob.has_magic(str(root)):
        root = root.parent
    if not root.is_dir():
        root = root.parent
    models = sorted(set(_matches(path)))
    # A folder is a model that cannot be read if it is named like one.
    return [(model, root) for model in models if is_model(model) or not model.is_dir()]


def _matches(pattern: Path) -> Iterator[Path]:
    """What a local glob matches. `**` is any number of folders, as in a shell."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207 - it finds links to nothing
        return
    stars = pattern.parts.index("**")
    above, below = Path(*pattern.parts[:stars]), pattern.parts[stars + 1 :] or ("*",)
    while below[0] == "**" and len(below) > 1:
        below = below[1:]
    for top in _matches(above):
        for folder in _folders_below(top):
            yield from _matches(Path(glob.escape(folder), *below))


def _folders_below(top: Path) -> Iterator[str]:
    """`top` and each folder below it once, under its own path rather than behind a link to it.

    Links to other folders are followed: they may lead back to where they lie, or to each other.
    """
    seen = set()
    waiting = deque([str(top)])
    while waiting:
        for folder, names, _ in os.walk(waiting.popleft()):
            real = os.path.realpath(folder)
            visible = sorted(name for name in names if not name.startswith("."))
            names[:] = visible if real not in seen else []
            if real not in seen:
                yield folder
            seen.add(real)
            paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118 - of os.walk
            waiting.extend(path for path in paths if os.path.islink(path))  # noqa: PTH114 - as above


def _glob_in_store(pattern: Url) -> list[tuple[Location, Location]]:
    """As `_glob`, of a folder or a glob in a store."""
    root = pattern
    while glob.has_magic(str(root)) and root != root.parent:
        root = root.parent
    if root == pattern:
        pattern /= MODELS
    shows_hidden = any(part.startswith(".") for part in pattern.relative_to(root).parts)

    def is_meant(url: Url) -> bool:
        hidden = {part for part in url.relative_to(root).parts if part.startswith(".")}
        if hidden and not (shows_hidden and hidden.isdisjoint((".", ".."))):
            return False
        return is_model(url) or not host_cache().stat(url).is_folder

    return [(url, root) for url in host_cache().find(pattern, root) if is_meant(url)]
