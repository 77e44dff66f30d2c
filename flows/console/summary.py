"""summary.json: how a run ended, for programs."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quant_core.model.atomic import atomic_write, overwrite
from quant_core.text import plain
from tasks.rows import AuditRow, ModelRow

FULL = (errno.ENOSPC, errno.EDQUOT)
WRONG_COLUMNS = (
    "model",
    "outcome",
    "verdict",
    "reason",
    "stage",
    "error",
    "where",
    "hint",
    "output",
)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary as JSON. The file appears as a whole, or stays as it was.

    A full disk has no room for another file: then the one that is there is overwritten.

    Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written_at = datetime.now(UTC).isoformat()
    values = plain({**summary, "written_at": written_at})
    content = json.dumps(values, indent=2, allow_nan=False).encode() + b"\n"
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as problem:
        if problem.errno not in FULL or not path.exists():
            raise
        overwrite(path, content)


def read_summary(path: Path) -> dict[str, Any]:
    """The summary at `path`, {} if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def wrong(rows: Iterable[ModelRow | AuditRow]) -> list[dict[str, Any]]:
    """The columns that matter of each model that failed, missed its contract or got worse."""
    found = [row.to_json() for row in rows if row.is_wrong]
    return [{column: values.get(column) for column in WRONG_COLUMNS} for values in found]
