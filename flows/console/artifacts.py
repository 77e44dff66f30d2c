"""What Prefect's UI shows of a run: a table of models, facts, how far it is, a link to the page.

An API that does not answer is no reason to lose a run, nor to wait for it again and again.
"""

from __future__ import annotations

import contextlib
import html
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.console.events import Event, Listener, ModelDone
from quant_core.text import counted, printable

MAX_ROWS = 500  # of the table
PROGRESS_S = 5.0

# Prefect is imported inside the functions: `cell` needs none of it.


def show_in_prefect(
    kind: str,
    run_id: str,
    lines: Sequence[Mapping[str, object]],
    facts: Mapping[str, object],
    page: Path | None,
) -> None:
    """Create a table of these lines, a list of facts and a link to the page in Prefect's UI.

    Browsers follow no link from a server to a file: the link's text is the path, to be copied.
    """
    from prefect.artifacts import (
        create_link_artifact,
        create_markdown_artifact,
        create_table_artifact,
    )

    listed = [f"- {cell(key.replace('_', ' '))}: {cell(value)}" for key, value in facts.items()]
    filled = [key for key in (lines[0] if lines else ()) if any(str(line[key]) for line in lines)]
    table = [{key: cell(line[key]) for key in filled} for line in lines]
    summary = "\n".join([f"# {kind.title()} {run_id}", *listed])
    with contextlib.suppress(Exception):
        create_table_artifact(table, key=f"quantmill-{kind}-models", description=f"{kind} {run_id}")
        create_markdown_artifact(summary, key=f"quantmill-{kind}-summary")
        if page is not None and page.exists():
            key = f"quantmill-{kind}-report"
            path = page.absolute()
            create_link_artifact(path.as_uri(), cell(path), key, f"{kind} {run_id}")


def with_progress(
    kind: str, models: int, listener: Listener, is_lost: Callable[[], bool]
) -> Listener:
    """A listener that calls `listener`, and shows in Prefect's UI what share of the models is done.

    is_lost  whether the API does not answer any more

    It tells the API every PROGRESS_S seconds at most.
    """
    from prefect.artifacts import create_progress_artifact, update_progress_artifact

    artifact: Any = None
    with contextlib.suppress(Exception):
        artifact = create_progress_artifact(
            0.0, f"quantmill-{kind}-progress", counted(models, "model")
        )
    done = 0
    shown_at = time.monotonic()
    lock = threading.Lock()

    def listen(event: Event) -> None:
        nonlocal artifact, done, shown_at
        listener(event)
        if artifact is None or not isinstance(event, ModelDone):
            return
        with lock:
            done += 1
            now = time.monotonic()
            is_due = done == models or now - shown_at >= PROGRESS_S
            shown_at = now if is_due else shown_at
            percent = 100.0 * done / models
        if is_due and is_lost():
            artifact = None
        elif is_due:
            try:
                update_progress_artifact(artifact, percent)
            except Exception:  # Prefect's client raises errors of several libraries
                artifact = None

    return listen


def cell(value: object) -> str:
    """The value as text that Prefect's UI shows as it is.

    Names from strangers must be neither Markdown, HTML nor control characters there.
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else html.escape(printable(value), quote=False)
    return text.replace("`", "&#96;").replace("|", "\\|")
