"""The name of a result: a digest of model, data, config, contract, target and versions."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.manifest.custom_metrics import custom_metric_of
from flows.manifest.files import files_to_read
from flows.manifest.jobs import Job
from quant_core.data.spec import Flow, SampleSpec
from quant_core.errors import DataError, ModelError, reason_of
from quant_core.model.locations import model_files
from quant_core.plan.targets import find_target
from quant_core.text import digest_of
from quant_core.versions import versions
from tasks.cache import SAMPLES, Content, host_cache
from tasks.contents import file_digest
from tasks.locations import Location, Url, location

QUIET_S = 1.0  # a file that nobody has written to for so long is complete
PATIENCE_S = 60.0  # for a file that is being copied; then its model fails until the next run


def job_digest(
    job: Job, allow_code: str | None = None, made_with: Mapping[str, str] | None = None
) -> str:
    """The name of everything that is made for this job.

    The same bytes, options and versions give the same name.

    allow_code  the folder of metrics `module:function`
    made_with   package -> version, where other versions than those installed here are meant

    Raises: ModelError or DataError for a file that cannot be read, or that is still being written.
    """
    try:
        model = _model_digests(job.input)
    except OSError as problem:
        where = str(problem.filename or job.input)
        raise ModelError(f"cannot be read: {reason_of(problem)}", where) from problem
    specs = [spec for spec in (job.calibration, job.evaluation) if spec is not None]
    try:
        samples = [_samples(spec, spec is job.calibration) for spec in specs]
    except OSError as problem:
        raise DataError(f"cannot be read: {reason_of(problem)}", str(problem.filename)) from problem
    made_of = {
        "model": model,
        "samples": samples,
        "config": job.config.to_dict() | {"target": find_target(job.config.target).name},
        "contract": job.contract.to_dict() if job.contract else None,
        "output": job.output.name,
        "versions": dict(made_with or versions()),
    }
    metric = custom_metric_of(job)
    if metric is not None and allow_code is not None:
        made_of["code"] = _code_digests(Path(allow_code), metric)
    return digest_of(json.dumps(made_of, sort_keys=True).encode())


def _code_digests(folder: Path, metric: str) -> dict[str, str]:
    """Place -> digest of the Python files of the module or package that holds a metric.

    What they import from elsewhere is not looked at.

    Raises: DataError for a file that cannot be read.
    """
    package = re.split("[.:]", metric, maxsplit=1)[0]
    files = [folder / f"{package}.py", *sorted((folder / package).rglob("*.py"))]
    try:
        return {str(f.relative_to(folder)): file_digest(f) for f in files if f.exists()}
    except OSError as problem:
        raise DataError(f"cannot be read: {reason_of(problem)}", str(problem.filename)) from problem


def url_contents(job: Job) -> dict[str, Content]:
    """URL -> what it holds, for each model and file of samples that the job reads from a store.

    Raises: ModelError or DataError.
    """
    found = {}
    flows = [spec.flow for spec in (job.calibration, job.evaluation) if spec and spec.flow]
    before = [(("input",), location(path)) for flow in flows for path in flow.before]
    for key, place in (*files_to_read(job), *before):
        if not isinstance(place, Url):
            continue
        is_model = key[0] == "input"
        try:
            cache = host_cache()
            found[str(place)] = cache.model(place) if is_model else cache.samples(place)
        except OSError as problem:
            kind = ModelError if is_model else DataError
            where = str(problem.filename or place)
            raise kind(f"cannot be read: {reason_of(problem)}", where) from problem
    return found


def samples_digest(path: Location) -> str:
    """The digest of a file, or of the names and bytes of the arrays in a folder of samples."""
    if isinstance(path, Url):
        content = host_cache().samples(path)
        digests = [(name, str(digest)) for name, (_, digest) in content.files.items()]
        return digests[0][1] if content.name else _folder_digest(digests)
    _wait_until_complete(path)
    if not path.is_dir():
        return file_digest(path)
    inside = sorted(p for p in path.iterdir() if p.suffix in SAMPLES and p.is_file())
    return _folder_digest([(p.name, file_digest(p)) for p in inside])


def _folder_digest(files: Sequence[tuple[str, str]]) -> str:
    return digest_of(json.dumps(files).encode())


def _samples(spec: SampleSpec, calibrates: bool) -> dict[str, Any]:
    """What decides which samples are read, in plain JSON values."""
    return {
        "files": [samples_digest(location(path)) for _, path in spec.files()],
        "count": spec.count,
        "seed": spec.seed,
        "shape": spec.shape,
        "labelled": spec.labels is not None,
        "calibrates": calibrates,
        "flow": _flow(spec.flow) if spec.flow is not None else None,
    }


def _flow(flow: Flow) -> list[Any]:
    """What decides what reaches a graph from those before it. One that is missing fails later."""
    digests = []
    for path in flow.before:
        with contextlib.suppress(FileNotFoundError):
            digests += _model_digests(location(path))
    return [flow.start, digests]


def _model_digests(model: Location) -> list[str]:
    """The digest of a model, then those of the files of its external data."""
    if isinstance(model, Url):
        return [str(digest) for _, digest in host_cache().model(model).files.values()]
    digests = []
    for path in model_files(model):
        _wait_until_complete(path)
        digests.append(file_digest(path))
    return digests


def _wait_until_complete(path: Path) -> None:
    """Return once nobody writes to the file any more. Raises: OSError if somebody does."""
    deadline = time.monotonic() + PATIENCE_S
    while 0 <= time.time() - path.stat().st_mtime < QUIET_S:
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "still being written", str(path))
        time.sleep(0.1)
