"""A folder of Hugging Face as one batch: its graphs, what flows between them, and its other files.

    FOLDER/config.json, tokenizer.json ...    copied
    FOLDER/onnx/encoder_model.onnx            onnx/encoder_model_int8.onnx, of its own samples
    FOLDER/onnx/decoder_model_merged.onnx     onnx/decoder_model_merged_int8.onnx, of what the float
                                              encoder gives
    FOLDER/onnx/*.onnx_data                   read with its graphs, not copied
    FOLDER/onnx/encoder_model_fp16.onnx*      left out, as every variant of another graph
    FOLDER/model.safetensors                  left out, as weights of other frameworks

Graphs at the top of the folder, where optimum exports them, are written into `onnx` too. The folder
may lie in a store.

Source: transformers.js, src/utils/dtypes.js, `DEFAULT_DTYPE_SUFFIX_MAPPING`: int8 is loaded from
`_int8`, q4 from `_q4`, and q8, the default in a browser, from `_quantized`, in the folder `onnx`
(src/utils/model_registry/get_model_files.js).
optimum-onnx, optimum/onnxruntime/quantization.py, `ORTQuantizer.quantize`: the suffix is
`quantized`; optimum/onnxruntime/constants.py: the names of graphs, looked for in every folder.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from flows.manifest.paths import below, real_path
from quant_core.data.spec import Flow
from tasks.cache import host_cache
from tasks.locations import Location, Url, is_model
from tasks.stores import read

GRAPHS = "onnx"  # the folder of the graphs
SUFFIXES = {8: "_int8", 4: "_q4"}
SECOND_SUFFIXES = {8: "_quantized"}  # another name of the same file
VARIANT = re.compile(r"_(fp16|quantized|bnb4|u?int8|q\d+(f16)?|O\d|qu?int8\w*)$")
# Source: transformers, src/transformers/utils/__init__.py, `WEIGHTS_NAME` and those after it.
OTHER_WEIGHTS = re.compile(
    r"(pytorch_model.*\.bin|.*\.safetensors|tf_model.*\.h5|flax_model.*\.msgpack|.*\.gguf)"
    r"(\.index\.json)?"
)
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

    input: Location
    place: PurePath
    flow: Flow
    data: str | None = None


def find_graphs(folder: Location) -> list[Graph]:
    """The float graphs of a folder, each after those that flow into it.

    Raises: OSError if a store cannot be listed.
    """
    originals, _ = _graphs_in(files_below(folder))
    start, sizes = _start_token(folder), _sizes(folder)
    shared = _shared_data(originals)
    graphs = []
    for path in sorted(originals, key=lambda path: (str(path.parent), _rank(path), path.name)):
        beside = [other for other in originals if other.parent == path.parent]
        _, earlier = _ranks(path)
        before = sorted((other for other in beside if _rank(other) < earlier), key=_rank)
        place = below(path, folder).parent
        if place == PurePath():
            place = PurePath(GRAPHS)
        flow = Flow(tuple(map(str, before)), start, sizes)
        graphs.append(Graph(path, place, flow, shared.get(path)))
    return graphs


def output_name(name: str, bits: int) -> str:
    """The name of what becomes of a file, which is a graph or its weights."""
    stem, dot, rest = name.partition(".")
    return f"{stem}{SUFFIXES[bits]}{dot}{rest}"


def second_name(output: Location, bits: int) -> Location | None:
    """The other name under which the same file is looked for, None if there is no other."""
    if bits not in SECOND_SUFFIXES:
        return None
    stem = output.stem.removesuffix(SUFFIXES[bits])
    return output.with_name(f"{stem}{SECOND_SUFFIXES[bits]}.onnx")


def other_files(folder: Location, output_dir: Location) -> list[tuple[Location, Location]]:
    """Each file that holds no graph and no weights, with its place below `output_dir`.

    Raises: OSError if a store cannot be listed.
    """
    if real_path(folder) == real_path(output_dir):
        return []
    files = files_below(folder)
    originals, variants = _graphs_in(files)
    weights = {real_path(file) for graph in originals for file in (graph, *_data_files(graph))}
    # A variant in a store is not fetched; the names of its files of data begin with its own.
    left_out = tuple(map(str, variants))
    made = f"{output_dir}/"
    return [
        (path, output_dir / below(path, folder))
        for path in files
        if real_path(path) not in weights
        if not str(path).startswith((made, *left_out))
        if not OTHER_WEIGHTS.fullmatch(path.name)
    ]


def files_below(folder: Location) -> list[Location]:
    """Every file below a folder that is not hidden, in the order of their names.

    Raises: OSError if a store cannot be listed.
    """
    found: Iterable[Location]
    if isinstance(folder, Url):
        found = host_cache().files_below(folder)
    else:
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in below(path, folder).parts)
    ]


def _graphs_in(files: Iterable[Location]) -> tuple[list[Location], list[Location]]:
    """The float graphs among these files, and those that hold one of them in another type."""
    graphs = [path for path in files if is_model(path)]
    known = set(graphs)
    variants = [path for path in graphs if _is_variant(path, known)]
    return [path for path in graphs if path not in variants], variants


def _data_files(graph: Location) -> Sequence[Location]:
    """The files of a graph's external data; none of a graph that cannot be read: its job fails."""
    # It imports onnx, and only folders of graphs need it.
    from quant_core.model.locations import model_files

    with contextlib.suppress(OSError):
        if isinstance(graph, Url):
            names = [*host_cache().model(graph).files][1:]
            return [graph.with_name(name) for name in names]
        return [*model_files(graph)][1:]
    return []


def _shared_data(graphs: Iterable[Location]) -> dict[Location, str]:
    """Graph -> the name of the first file of external data that another graph reads too."""
    readers: dict[Location, list[Location]] = {}
    for graph in graphs:
        for file in _data_files(graph):
            readers.setdefault(file, []).append(graph)
    found: dict[Location, str] = {}
    for file, read_by in readers.items():
        if len(read_by) > 1:
            found |= {graph: found.get(graph, file.name) for graph in read_by}
    return found


def _is_variant(path: Location, known: set[Location]) -> bool:
    """Whether the file holds another graph of the folder in another type."""
    stem = VARIANT.sub("", path.stem)
    return stem != path.stem and path.with_name(f"{stem}.onnx") in known


def _rank(path: Location) -> int:
    return _ranks(path)[0]


def _ranks(path: Location) -> tuple[int, int]:
    return next((rank, below) for name, rank, below in RANKS if re.search(name, path.stem))


def _start_token(folder: Location) -> int | None:
    """The token that a decoder begins with, as the folder's configs name it."""
    configs = [_read_json(folder / name) for name in CONFIGS]
    parts = [part for c in configs for part in (c, c.get("decoder"), c.get("text_config"))]
    for key in ("decoder_start_token_id", "bos_token_id"):
        for part in parts:
            token = part.get(key) if isinstance(part, dict) else None
            if isinstance(token, int) and not isinstance(token, bool):
                return token
    return None


def _sizes(folder: Location) -> dict[str, tuple[int, ...]]:
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


def _read_json(path: Location) -> dict[str, Any]:
    """The object in that file, empty if it cannot be read."""
    try:
        if isinstance(path, Url):
            is_large = host_cache().stat(path).size > MAX_CONFIG_BYTES
            values = {} if is_large else json.loads(read(path))
        else:
            is_large = path.stat().st_size > MAX_CONFIG_BYTES
            values = {} if is_large else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
