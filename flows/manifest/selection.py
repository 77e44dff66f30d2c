"""Which models of a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from flows.manifest.jobs import Job, Manifest
from quant_core.errors import RequestError


def select(manifest: Manifest, only: Sequence[str]) -> list[Job]:
    """The jobs whose name one of the globs matches, all without globs. Raises: RequestError if that leaves none."""
    jobs = [
        job
        for job in manifest.jobs
        if not only or any(fnmatchcase(job.name, glob) for glob in only)
    ]
    if not jobs:
        names = ", ".join(job.name for job in manifest.jobs[:5])
        raise RequestError(
            f"matches no model: {', '.join(only)}", "only", f"Models are called {names}"
        )
    return jobs
