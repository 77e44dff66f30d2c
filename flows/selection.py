"""Which models of a manifest, and how much of this host they take."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from flows.digests import model_files
from flows.manifest import Job, Manifest
from flows.runtime import Size
from quant_core.errors import RequestError


def select(manifest: Manifest, only: Sequence[str]) -> list[Job]:
    """The jobs whose name one of the globs matches, all without globs. Raises: RequestError if that leaves none."""
    jobs = [job for job in manifest.jobs if not only or any(fnmatchcase(job.name, glob) for glob in only)]
    if not jobs:
        names = ", ".join(job.name for job in manifest.jobs[:5])
        raise RequestError(f"matches no model: {', '.join(only)}", "only", f"Models are called {names}")
    return jobs


def size_for(manifest: Manifest, jobs: int | None) -> Size:
    """Workers and memory for the models of a manifest."""
    largest = 1
    for job in manifest.jobs:
        with contextlib.suppress(OSError):
            largest = max(largest, sum(path.stat().st_size for path in model_files(job.input)))
    return Size.fitting(len(manifest.jobs), largest, jobs or manifest.workers, manifest.limits.memory_mb)
