"""The name of a result: a digest of model, data, config, contract, target and versions."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flows.manifest.jobs import Job
from quant_core.data.spec import Flow, SampleSpec
from quant_core.errors import DataError, ModelError
from quant_core.model.locations import model_files
from quant_core.plan.targets import find_target
from quant_core.worker.host import versions

QUIET_S = 1.0  # a file that nobody has written to for so long is complete
PATIENCE_S = 60.0  # for a file that is being copied; then its model fails until the next run


def job_digest(job: Job, made_with: Mapping[str, str] | None = None) -> str:
    """The name of everything that is made for this job.

    The same bytes, options and versions give the same name.

    made_with  package -> version, where other versions than those installed here are meant

    Raises: ModelError or DataError for a file that cannot be read, or that is still being written.
    """
    try:
        model = [_complete_digest(path) for path in model_files(job.input)]
    except OSError as problem:
        where = str(problem.filename or job.input)
        raise ModelError(f"cannot be read: {_reason(problem)}", where) from problem
    specs = [spec for spec in (job.calibration, job.evaluation) if spec is not None]
    try:
        samples = [_samples(spec, spec is job.calibration) for spec in specs]
    except OSError as problem:
        raise DataError(f"cannot be read: {_reason(problem)}", str(problem.filename)) from problem
    made_of = {
        "model": model,
        "samples": samples,
        "config": job.config.to_dict() | {"target": find_target(job.config.target).name},
        "contract": job.contract.to_dict() if job.contract else None,
        "output": job.output.name,
        "versions": dict(made_with or versions()),
    }
    return _hash(json.dumps(made_of, sort_keys=True).encode())


def files_digest(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """File name -> size in bytes and digest: while they hold, the result counts as done."""
    return {name: [(folder / name).stat().st_size, file_digest(folder / name)] for name in names}


def file_digest(path: Path) -> str:
    """The digest of a file, or of the names and bytes of the arrays in a folder of samples."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy") and p.is_file())
        return _hash(json.dumps([(p.name, file_digest(p)) for p in inside]).encode())
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


def forget_files() -> None:
    """Make `file_digest` read every file again.

    A long-lived process must not trust times of modification for ever.
    """
    _file_digest.cache_clear()


@lru_cache(maxsize=100_000)
def _file_digest(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """The digest of a file, which is read once however many models share it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _samples(spec: SampleSpec, calibrates: bool) -> dict[str, Any]:
    """What decides which samples are read, in plain JSON values."""
    return {
        "files": [_complete_digest(path) for _, path in spec.files()],
        "count": spec.count,
        "seed": spec.seed,
        "shape": spec.shape,
        "labelled": spec.labels is not None,
        "calibrates": calibrates,
        "flow": _flow(spec.flow) if spec.flow is not None else None,
    }


def _flow(flow: Flow) -> list[Any]:
    """What decides what reaches a graph from those before it. One that is missing fails later."""
    graphs = [Path(path) for path in flow.before if Path(path).is_file()]
    return [flow.start, [_complete_digest(file) for graph in graphs for file in model_files(graph)]]


def _complete_digest(path: Path) -> str:
    """The digest of a file once nobody writes to it any more. Raises: OSError if somebody does."""
    deadline = time.monotonic() + PATIENCE_S
    while 0 <= time.time() - path.stat().st_mtime < QUIET_S:
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "still being written", str(path))
        time.sleep(0.1)
    return file_digest(path)


def _reason(problem: OSError) -> str:
    return (problem.strerror or str(problem)).lower()


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
