"""How a model is run: by onnxruntime on the CPU, quietly, with errors that a person can act on."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.errors import ModelError
from quant_core.model.containers import boxed, unboxed
from quant_core.model.inner_outputs import inner_outputs
from quant_core.model.runtime_errors import loading_error, short_message

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Model = Union[str, Path, bytes, "ir.Model"]
Optimize = bool | Literal["basic"]
Feed = Mapping[str, NDArray[Any]]  # input -> its value

LEVELS = {
    True: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    False: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}

CPU = "CPUExecutionProvider"
RANDOM = b"Random"  # how the types of random nodes begin
# In float32 as on the CPU, where a provider would rather be fast.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0"},
    "OpenVINOExecutionProvider": {"precision": "FP32"},
}


def open_session(
    model: Model,
    *,
    threads: int = 1,
    optimize: Optimize = True,
    outputs: Sequence[str] = (),
    packed: bool = True,
    provider: str = CPU,
) -> ort.InferenceSession:
    """A session for a file, for the bytes of one, or for a model; its threads sleep when idle.

    optimize  True: all that onnxruntime does by default; "basic": what stays portable; False:
              nothing
    outputs   names of inner tensors that become outputs too, after the model's own
    packed    copy weights once into the layout that kernels read fastest; without it a session
              opens faster and takes less memory, which pays if it runs a few times only
    provider  the execution provider, as `find_provider` names it; the CPU runs what it cannot

    Raises: ModelError if the file is missing, if it is not a model, or if it holds what
    onnxruntime's CPU provider cannot run.
    """
    options = _options(threads, optimize)
    if not (packed and optimize):
        options.add_session_config_entry("session.disable_prepacking", "1")
    return _open(model, options, outputs, provider)


def open_profiled(model: Model, prefix: Path, *, threads: int) -> ort.InferenceSession:
    """A session that writes the time of each kernel; `end_profiling` returns the JSON's path.

    prefix  the beginning of that path

    Raises: ModelError as `open_session`.
    """
    options = _options(threads, optimize=True)
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    return _open(model, options)


def run(
    session: ort.InferenceSession,
    feed: Feed,
    where: str = "",
    outputs: Sequence[str] | None = None,
) -> list[np.ndarray]:
    """All outputs for one feed, or those of these names.

    A sequence or a map is an array of objects, both in the feed and among the outputs.

    Raises: ModelError, about `where`, if the model cannot run on the feed.
    """
    with failing_on(feed, where):
        found = session.run(outputs, {name: unboxed(array) for name, array in feed.items()})
    session.has_run = True
    return [boxed(x) for x in found]


def run_known(
    session: ort.InferenceSession, known: Mapping[str, np.ndarray], where: str = ""
) -> dict[str, np.ndarray]:
    """All outputs by name, of those of the known arrays that the model takes. Raises: as `run`."""
    feed = {i.name: known[i.name] for i in session.get_inputs()}
    return dict(zip(output_names(session), run(session, feed, where), strict=True))


def output_names(session: ort.InferenceSession) -> list[str]:
    """The names of the outputs, in their order."""
    return [output.name for output in session.get_outputs()]


@contextmanager
def failing_on(feed: Feed, where: str = "") -> Iterator[None]:
    """What onnxruntime raises within is a ModelError, about `where`: no model runs on the feed."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no other class in common
        shapes = ", ".join(
            f"{name} {array.dtype}{list(array.shape)}" for name, array in feed.items()
        )
        raise ModelError(
            f"does not run on {shapes}: {short_message(error)}",
            where,
            "Give samples, or a `shape`, that the model can take",
        ) from error


def interface(model: Model) -> set[str]:
    """The names of a model's inputs and outputs. Raises: ModelError as `open_session`."""
    if not isinstance(model, (str, Path, bytes)):
        return {str(v.name) for v in (*model.graph.inputs, *model.graph.outputs)}
    session = open_session(model, optimize=False)
    return {v.name for v in (*session.get_inputs(), *session.get_outputs())}


def sizes_of(model: Model, tensors: Iterable[str], feed: Feed) -> dict[str, int]:
    """Elements of each of these tensors, inputs among them, for this feed: one run tells.

    No tensor is an output of that run, so that it takes little memory.

    Raises: ModelError as `open_session` and `run`.
    """
    sizes = {name: int(np.size(feed[name])) for name in tensors if name in feed}
    inner = [name for name in dict.fromkeys(tensors) if name not in sizes]
    if not inner:
        return sizes
    counted = [f"quantmill: elements of {name}" for name in inner]  # no model has such a name
    options = _options(1, optimize=False)
    options.add_session_config_entry("session.disable_prepacking", "1")  # it runs once
    # Sizes come first, so that a tensor need not wait for its own.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    session = _open(model, options, counted, counting=inner)
    found = run(session, feed, outputs=counted)
    return sizes | {name: int(size) for name, size in zip(inner, found, strict=True)}


def optimized_graph(model: Model, *, optimize: Optimize = True) -> onnx.ModelProto:
    """The graph as onnxruntime runs it: it shows what was fused into which kernel.

    Only "basic" gives a model that other machines and runtimes can load.

    Raises: ModelError as `open_session`.
    """
    import onnx  # as slow as numpy and onnxruntime together, and only this function needs it

    with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
        return onnx.load(write_optimized(model, Path(folder), optimize=optimize))


def write_optimized(model: Model, folder: Path, *, optimize: Optimize = True) -> Path:
    """Write the optimized graph into the folder, large tensors into a file beside it.

    Returns the path of the graph. Raises: ModelError as `open_session`.
    """
    path = folder / "optimized.onnx"
    options = _options(1, optimize)
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "weights"
    )
    # The kernels never run, so their copies of the weights are not needed.
    options.add_session_config_entry("session.disable_prepacking", "1")
    _open(model, options, is_run=False)
    return path


@cache
def _share_arena() -> None:
    """One arena for the tensors of all sessions of this process, which grows by what is requested.

    Each session would keep an arena of its own otherwise, twice as large as what it runs with.
    """
    growing_as_requested = ort.OrtArenaCfg(0, 1, -1, -1)
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    with suppress(RuntimeError):  # whoever runs this process has registered one
        ort.create_and_register_allocator(memory, growing_as_requested)


def _options(threads: int, optimize: Optimize) -> ort.SessionOptions:
    _share_arena()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Weights outlive no session: outside the arena their memory goes back to the system.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # the exception reports a failure; once is enough
    options.graph_optimization_level = LEVELS[optimize]
    # Idle threads that spin steal the cores of every other session in the process.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _open(
    model: Model,
    options: ort.SessionOptions,
    outputs: Sequence[str] = (),
    provider: str = CPU,
    counting: Sequence[str] = (),
    *,
    is_run: bool = True,
) -> ort.InferenceSession:
    """A session with these outputs too.

    counting  the tensors whose elements nodes count that write these outputs, one each
    is_run    whether random nodes are fixed (fixed_noise.py)
    """
    chosen = [] if provider == CPU else [(provider, PROVIDER_OPTIONS.get(provider, {}))]
    where = str(model) if isinstance(model, (str, Path)) else "model in memory"
    if isinstance(model, (str, Path)) and not Path(model).is_file():
        from quant_core.model.files import no_file  # it imports onnx, see below

        raise no_file(Path(model))
    if is_run and _may_draw(model):
        from quant_core.model.fixed_noise import with_fixed_noise  # it imports onnx, see above

        model = with_fixed_noise(Path(model) if isinstance(model, str) else model) or model
    try:
        with _source(model, in_memory=bool(outputs), externalizes=not chosen) as (
            source,
            folder,
            weights,
        ):
            if folder is not None:
                options.add_session_config_entry(
                    "session.model_external_initializers_file_folder_path", str(folder)
                )
            if isinstance(source, bytes) and outputs:
                source += inner_outputs(outputs, counting)
            external = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            if external:
                options.add_external_initializers(list(weights), external)
            # enable_fallback=0: a failure is an error, not a message on stdout and another try
            session = ort.InferenceSession(
                source, options, providers=[*chosen, CPU], enable_fallback=0
            )
            session.external = external  # it reads them where they lie, and must keep them alive
            session.has_run = False  # the first run allocates memory
            return session
    except (MemoryError, ModelError):
        raise
    except Exception as error:  # onnxruntime's exceptions have no other class in common
        raise loading_error(error, where) from error


def _may_draw(model: Model) -> bool:
    """Whether the model may have random nodes: a file is not parsed for that."""
    if isinstance(model, bytes):
        return RANDOM in model
    if not isinstance(model, (str, Path)):
        return True
    with Path(model).open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return False  # it cannot be mapped
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(RANDOM) >= 0


@contextmanager
def _source(
    model: Model, *, in_memory: bool, externalizes: bool
) -> Iterator[tuple[str | bytes, Path | None, Mapping[str, np.ndarray]]]:
    """A path or a model in memory, the folder of the tensors that are not in it, and the weights
    that are in neither, if it `externalizes` them (external_initializers.py).
    """
    if isinstance(model, bytes):
        yield model, None, {}
    elif not isinstance(model, (str, Path)):
        # Both import onnx, see above.
        from quant_core.model.external_initializers import external_initializers
        from quant_core.model.files import external_tensors, serialized

        if externalizes and next(external_tensors(model), None) is None:
            named, weights = external_initializers(model)
            yield named.SerializeToString(), None, weights
            return
        # onnxruntime maps or reads the files while it loads: they can go once it has loaded.
        with tempfile.TemporaryDirectory(prefix="quantmill-", ignore_cleanup_errors=True) as folder:
            yield *serialized(model, Path(folder)), {}
    elif in_memory:
        yield Path(model).read_bytes(), Path(model).absolute().parent, {}
    else:
        yield str(model), None, {}
