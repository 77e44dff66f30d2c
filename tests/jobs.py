"""Jobs as the journal keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from flows.manifest.jobs import Job


def after_json(jobs: Iterable[Job], replaced: tuple[str, str] = ("", "")) -> tuple[Job, ...]:
    """The jobs once they were written as JSON and read again, with one text replaced in it."""
    old, new = replaced
    texts = [json.dumps(job.to_dict()) for job in jobs]
    return tuple(Job.from_dict(json.loads(t.replace(old, new) if old else t)) for t in texts)
