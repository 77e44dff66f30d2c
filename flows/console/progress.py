"""What is seen while a batch works: a live table in a terminal, plain lines in a log, JSON lines for a program."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from flows.console.render import verdict_text
from flows.console.result import Listener
from quant_core.text import printable

SHOWN = 12  # models in the live table

Event = Mapping[str, Any]


@contextlib.contextmanager
def progress(as_json: bool) -> Iterator[Listener]:
    """A listener for a batch, in the way that suits who is watching."""
    if as_json:
        yield _json_line
    elif sys.stderr.isatty():
        with _LiveTable() as table:
            yield table.tell
    else:
        yield _line


def _json_line(event: Event) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _line(event: Event) -> None:
    text = _told(event)
    if text:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _told(event: Event) -> str:
    match event["event"]:
        case "starting":
            return "starting Prefect and Dask"
        case "started":
            return f"run {event['run_id']}: {event['models']} models, {event['workers']} workers"
        case "phase":
            return f"{event['phase']}: {event['models']} models, one at a time"
        case "model":
            return f"{printable(event['model'])}: {_outcome(event).plain}"
    return ""


def _outcome(event: Event) -> Text:
    if event["outcome"] == "failed":
        return verdict_text("failed", f"{event['stage']}: {event['error']}")
    word = {"met": "met", "not_met": "not_met"}.get(event["verdict"], event["outcome"])
    return verdict_text(str(word), event.get("reason") or "")


class _LiveTable:
    """Models at work with their stage and how long it has run, and a bar of all."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.working: dict[str, tuple[str, float]] = {}
        self.finished: dict[str, Text] = {}
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            transient=True,
        )
        self.all = self.bar.add_task("starting", total=None)
        self.live = Live(
            get_renderable=self.draw,
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )

    def __enter__(self) -> _LiveTable:
        self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def tell(self, event: Event) -> None:
        with self.lock:
            match event["event"]:
                case "starting":
                    self.bar.update(self.all, description="starting Prefect and Dask")
                case "started":
                    self.bar.update(self.all, description="working", total=event["models"])
                case "phase":
                    self.bar.update(self.all, description=event["phase"])
                case "stage":
                    self.working[event["model"]] = (event["stage"], time.monotonic())
                case "made":
                    self.working.pop(event["model"], None)
                case "model":
                    self.working.pop(event["model"], None)
                    self.finished[event["model"]] = _outcome(event)
                    self.bar.update(self.all, completed=len(self.finished))

    def draw(self) -> Group:
        with self.lock:
            table = Table(box=None, pad_edge=False, show_header=False)
            for model, outcome in list(self.finished.items())[-SHOWN // 2 :]:
                table.add_row(Text(printable(model)), outcome)
            for model, (stage, since) in list(self.working.items())[:SHOWN]:
                table.add_row(
                    Text(printable(model)),
                    Text(f"{stage}  {time.monotonic() - since:.0f} s", style="cyan"),
                )
            return Group(table, self.bar)
