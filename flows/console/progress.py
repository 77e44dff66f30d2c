"""The progress of a run as a live table, as lines of a log, or as JSON lines for programs."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flows.console.events import (
    Event,
    Listener,
    Made,
    ModelDone,
    PhaseBegan,
    SkippedLines,
    StageBegan,
    Started,
    Starting,
    Unrecorded,
    Waiting,
    event_json,
)
from flows.console.run_views import outcome_text
from quant_core.text import counted, printable
from tasks.rows import model_label

MAX_MODELS = 12  # in the live table
WAITING = "waits until no other benchmark runs on its host"


@contextlib.contextmanager
def progress(as_json: bool) -> Iterator[Listener]:
    """A listener that shows events as JSON lines, as a live table, or as lines of a log.

    JSON lines go to stdout, everything else to stderr.
    """
    if as_json:
        yield _write_json
    elif sys.stderr.isatty():
        with _LiveTable() as table:
            yield table.update
    else:
        yield _write_line


def _write_json(event: Event) -> None:
    sys.stdout.write(json.dumps(event_json(event)) + "\n")
    sys.stdout.flush()


def _write_line(event: Event) -> None:
    text = _in_words(event)
    if text:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _in_words(event: Event) -> str:
    match event:
        case Starting(unused):
            note = f"; unused are {', '.join(unused)}: see --prefect inherit" if unused else ""
            return f"starting Prefect and Dask{note}"
        case Started(run_id, models, workers):
            return f"run {run_id}: {counted(models, 'model')}, {counted(workers, 'worker')}"
        case PhaseBegan(phase, models):
            return f"{phase}: {counted(models, 'model')}, one at a time"
        case SkippedLines(file, lines):
            return f"spoiled lines of {printable(file)} that are passed over: {lines}"
        case Waiting(model, output, seconds):
            return f"{model_label(model, output)}: {WAITING}, {seconds:.0f} s at most"
        case ModelDone(row):
            return f"{model_label(row.model, row.output)}: {outcome_text(row.to_json()).plain}"
        case Unrecorded(reason):
            return f"Prefect's server was lost, and does not know that the run is over: {reason}"
    return ""


class _LiveTable:
    """The models at work with their stage and its seconds, the last outcomes, and a bar of all.

    working   path of the output -> the model's label, its stage and since when
    finished  path of the output -> the model's label and its outcome
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.working: dict[str, tuple[str, str, float]] = {}
        self.finished: dict[str, tuple[str, Text]] = {}
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
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

    def update(self, event: Event) -> None:
        with self.lock:
            match event:
                case Starting():
                    self.bar.update(self.all, description="starting Prefect and Dask")
                case Started(models=models):
                    self.bar.update(self.all, description="working", total=models)
                case PhaseBegan(phase):
                    self.bar.update(self.all, description=phase)
                case StageBegan(model, output, stage):
                    self.working[output] = model_label(model, output), stage, time.monotonic()
                case Waiting(model, output):
                    self.working[output] = model_label(model, output), WAITING, time.monotonic()
                case SkippedLines() | Unrecorded():
                    self.live.console.print(Text(_in_words(event), "yellow"))
                case Made(output=output):
                    self.working.pop(output, None)
                case ModelDone(row):
                    self.working.pop(row.output, None)
                    label = model_label(row.model, row.output)
                    self.finished[row.output] = label, outcome_text(row.to_json())
                    self.bar.update(self.all, completed=len(self.finished))

    def draw(self) -> Group:
        with self.lock:
            table = Table(box=None, pad_edge=False, show_header=False)
            for label, outcome in list(self.finished.values())[-MAX_MODELS // 2 :]:
                table.add_row(Text(label), outcome)
            for label, stage, since in list(self.working.values())[:MAX_MODELS]:
                seconds = time.monotonic() - since
                table.add_row(Text(label), Text(f"{stage}  {seconds:.0f} s", "cyan"))
            return Group(table, self.bar)
