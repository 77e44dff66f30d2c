"""A folder of Hugging Face as one batch: its graphs, what flows between them, and its other files.

    FOLDER/config.json, tokenizer.json ...    copied
    FOLDER/onnx/encoder_model.onnx            onnx/encoder_model_int8.onnx, of its own samples
    FOLDER/onnx/decoder_model_merged.onnx     onnx/decoder_model_merged_int8.onnx, of what the float
                                              encoder gives
    FOLDER/onnx/*.onnx_data                   read with its graphs, not copied
    FOLDER/onnx/encoder_model_fp16.onnx       left out, as every variant of another graph

Graphs at the top of the folder, where optimum exports them, are written into `onnx` too.

Source: transformers.js, src/utils/dtypes.js, `DEFAULT_DTYPE_SUFFIX_MAPPING`: int8 is loaded from
`_int8`, q4 from `_q4`, and q8, the default in a browser, from `_quantized`, in the folder `onnx`
(src/utils/model_registry/get_model_files.js).
optimum-onnx, optimum/onnxruntime/quantization.py, `ORTQuantizer.quantize`: the suffix is
`quantized`; optimum/onnxruntime/constants.py: the names of graphs, looked for in every folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.data.spec import Flow

LAYOUT = "huggingface"
GRAPHS = "onnx"  # the folder of the graphs
SUFFIXES = {8: "_int8", 4: "_q4"}
SECOND_SUFFIXES = {8: "_quantized"}  # another name of the same file
VARIANT = re.compile(r"_(fp16|quantized|bnb4|u?int8|q\d+(f16)?|O\d|qu?int8\w*)$")
# Pattern of a graph's name -> its rank, and the rank below which graphs may flow into it. The first
# pattern that is found counts. A merged decoder begins by itself, and needs no other decoder.
RANKS = (
    (r"decoder.*merged", 5, 3),
    (r"decoder.*with_past", 4, 4),
    (r"decode", 3, 3),
    (r"head", 4, 4),
    (r"embed", 0, 0),
    (r"encode", 1, 1),
    (r"", 2, 2),
)
CONFIGS = ("generation_config.json", "config.json")
MAX_SIZE = 1 << 16  # of an axis of a sample
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Graph:
    """A float graph of a folder.

    place  the folder of its output, below the output folder
    data   the name of a file of weights that other graphs of its folder read too, None if none do
    """

    input: Path
    place: Path
    flow: Flow
    data: str | None = None


def find_graphs(folder: Path) -> list[Graph]:
    """The float graphs of a folder, each after those that flow into it."""
    start, sizes = _start_token(folder), _sizes(folder)
    found = [path for path in _files(folder) if path.suffix == ".onnx"]
    known = set(found)
    originals = [path for path in found if not _is_variant(path, known)]
    shared = _shared_data(originals)
    graphs = []
    for path in sorted(originals, key=lambda path: (path.parent, _rank(path), path.name)):
        beside = [other for other in originals if other.parent == path.parent]
        _, below = _ranks(path)
        before = sorted((other for other in beside if _rank(other) < below), key=_rank)
        place = path.parent.relative_to(folder)
        flow = Flow(tuple(map(str, before)), start, sizes)
        place = Path(GRAPHS) if place == Path() else place
        graphs.append(Graph(path, place, flow, shared.get(path)))
    return graphs


def output_name(name: str, bits: int) -> str:
    """The name of what becomes of a file, which is a graph or its weights."""
    stem, dot, rest = name.partition(".")
    return f"{stem}{SUFFIXES[bits]}{dot}{rest}"


def second_name(output: Path, bits: int) -> Path | None:
    """The other name under which the same file is looked for, None if there is no other."""
    if bits not in SECOND_SUFFIXES:
        return None
    stem = output.stem.removesuffix(SUFFIXES[bits])
    return output.with_name(f"{stem}{SECOND_SUFFIXES[bits]}.onnx")


def other_files(folder: Path, output_dir: Path) -> list[tuple[Path, Path]]:
    """Each file that is no graph and no data of one, with its place below `output_dir`."""
    if os.path.realpath(folder) == os.path.realpath(output_dir):
        return []
    files = list(_files(folder))
    graphs = [path for path in files if path.suffix == ".onnx"]
    weights = {_real(file) for graph in graphs for file in (graph, *_data_files(graph))}
    return [
        (path, output_dir / path.relative_to(folder))
        for path in files
        if _real(path) not in weights and not path.is_relative_to(output_dir)
    ]


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, in the order of their names."""
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.is_file():
            yield path


def _data_files(graph: Path) -> list[Path]:
    """The files of a graph's external data; none of a graph that cannot be read: its job fails."""
    # It imports onnx, and only folders of graphs need it.
    from quant_core.model.locations import model_files

    with contextlib.suppress(OSError):
        return list(model_files(graph))[1:]
    return []


def _shared_data(graphs: Iterable[Path]) -> dict[Path, str]:
    """Graph -> the name of the first file of external data that another graph reads too."""
    readers: dict[Path, list[Path]] = {}
    for graph in graphs:
        for file in _data_files(graph):
            readers.setdefault(file, []).append(graph)
    found: dict[Path, str] = {}
    for file, read_by in readers.items():
        if len(read_by) > 1:
            found |= {graph: found.get(graph, file.name) for graph in read_by}
    return found


def _is_variant(path: Path, known: set[Path]) -> bool:
    """Whether the file holds another graph of the folder in another type."""
    stem = VARIANT.sub("", path.stem)
    return stem != path.stem and path.with_name(f"{stem}.onnx") in known


def _rank(path: Path) -> int:
    return _ranks(path)[0]


def _ranks(path: Path) -> tuple[int, int]:
    return next((rank, below) for name, rank, below in RANKS if re.search(name, path.stem))


def _start_token(folder: Path) -> int | None:
    """The token that a decoder begins with, as the folder's configs name it."""
    configs = [_read_json(folder / name) for name in CONFIGS]
    parts = [part for c in configs for part in (c, c.get("decoder"), c.get("text_config"))]
    for key in ("decoder_start_token_id", "bos_token_id"):
        for part in parts:
            token = part.get(key) if isinstance(part, dict) else None
            if isinstance(token, int) and not isinstance(token, bool):
                return token
    return None


def _sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The sizes of images and spectrograms that the preprocessor makes.

    Source: transformers, CLIPImageProcessor and WhisperFeatureExtractor.
    """
    config = _read_json(folder / "preprocessor_config.json")
    found: dict[str, tuple[int, ...]] = {}
    for key in ("crop_size", "size"):
        size = config.get(key)
        edges = size if isinstance(size, dict) else {"height": size, "width": size}
        shortest = edges.get("shortest_edge")
        sides = _sizes_in(edges.get("height", shortest), edges.get("width", shortest))
        if sides:
            found.setdefault("pixel_values", sides)
    frames = _sizes_in(config.get("feature_size"), config.get("nb_max_frames"))
    return {**found, "input_features": frames} if frames else found


def _sizes_in(*values: Any) -> tuple[int, ...]:
    """The values, if all of them are sizes that an axis may have, else none."""
    are_sizes = all(type(value) is int and 0 < value <= MAX_SIZE for value in values)
    return values if are_sizes else ()


def _read_json(path: Path) -> dict[str, Any]:
    """The object in that file, empty if it cannot be read."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))
