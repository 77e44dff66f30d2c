"""Two models timed where JavaScript runs them: by onnxruntime-node, or by onnxruntime-web.

Neither is installed by quantmill: `npm install --ignore-scripts onnxruntime-node onnxruntime-web`
in the current folder or one above it, or in the folder that NODE_PATH names.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.timing import Timing, summarize
from quant_core.model.files import external_tensors, load

Runtime = Literal["node", "web", "wasm"]
RACE = Path(__file__).with_name("race.mjs")
IN_NODE = Path(__file__).with_name("in_node.mjs")
IN_BROWSER = Path(__file__).with_name("in_browser.html")
START_S = 120.0  # for node or a browser to start and both models to load, on a busy machine
LONGEST = 10  # times `seconds`: warm-up and rounds, whose last may be long
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a runtime runs: its npm package, its execution provider, and in which program."""

    package: str
    provider: str
    is_browser: bool = False


RUNTIMES: dict[Runtime, Host] = {
    "node": Host("onnxruntime-node", "cpu"),
    "web": Host("onnxruntime-web", "wasm", is_browser=True),
    # The same kernels outside a browser, by CPU time: for a machine that others use too.
    "wasm": Host("onnxruntime-web", "wasm"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Race:
    """How fast two models are in a runtime, and what they compute there: output -> array.

    control  the speed of the float model over a copy of itself in the same rounds: that of the
             other is wrong by as much at least; None if the copy does not fit into memory
    """

    timing: Timing
    control: float | None
    outputs: tuple[Mapping[str, NDArray[Any]], Mapping[str, NDArray[Any]]]


def race(
    runtime: Runtime,
    models: tuple[Path, Path],
    feed: Mapping[str, NDArray[Any]],
    *,
    threads: int = 1,
    seconds: float = 3.0,
) -> Race:
    """Time both models in turns on one feed, the float one first, with a copy of it as control.

    seconds  how long, at least; up to five times as long until the median speed is known to 1 %

    Raises: RequestError if the runtime is not installed; ModelError if a model does not run there.
    """
    for model in models:
        if not model.is_file():
            raise ModelError("no such file", str(model), "Give the path of an .onnx file")
    host = RUNTIMES[runtime]
    run = _run_in_browser if host.is_browser else _run_in_node
    package = find_package(host.package)
    job = {
        "threads": threads,
        "seconds": seconds,
        "providers": [host.provider],
        "external": [_external_files(model, host) for model in models],
        "feed": {name: _encode(x) for name, x in feed.items()},
    }
    result = run(package, models, job, START_S + LONGEST * seconds)
    if "error" in result:
        where = f"{models[0].name} and {models[1].name}"
        raise ModelError(f"do not run in {host.package}: {result['error']}", where)
    first, second = result["outputs"]
    timing, control = _summaries(np.array(result["times"]), threads)
    return Race(timing, control, (_decode_all(first), _decode_all(second)))


def _summaries(times: NDArray[np.float64], threads: int) -> tuple[Timing, float | None]:
    """The timing and the control, of times of shape (rounds, 2 or 3): see race.mjs."""
    if times.shape[1] == 2:
        return summarize(times, threads), None
    both = np.stack([times[:, [0, 2]].mean(axis=1), times[:, 1]], axis=1)
    return summarize(both, threads), summarize(times[:, [0, 2]], threads).speedup


def _external_files(model: Path, host: Host) -> list[dict[str, str]]:
    """What onnxruntime-web must know of each file beside a model that holds weights of it.

    onnxruntime-node finds them by itself.
    """
    if host.provider != "wasm":
        return []
    names = sorted({os.fspath(tensor.location) for tensor in external_tensors(load(model))})
    paths = [str((model.parent / name).resolve()) for name in names]
    where = map(quote, paths) if host.is_browser else paths
    return [{"path": name, "data": data} for name, data in zip(names, where, strict=True)]


def find_package(name: str) -> Path:
    """The folder of an npm package. Raises: RequestError if it is not installed."""
    here = Path.cwd()
    roots = [folder / "node_modules" for folder in (here, *here.parents)]
    roots += [Path(p) for p in os.environ.get("NODE_PATH", "").split(os.pathsep) if p]
    found = next((root / name for root in roots if (root / name / "package.json").exists()), None)
    if found is None:
        hint = f"npm install --ignore-scripts {name}"
        raise RequestError(f"{name} is not installed", "--runtime", hint)
    return found


def find_browser() -> str:
    """The path of Chromium or Chrome. Raises: RequestError if there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise RequestError(
            "no Chromium is installed", "--runtime web", "Debian's package is called chromium"
        )
    return found


def _run_in_node(
    package: Path, models: Sequence[Path], job: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        raise RequestError("node is not installed", "--runtime node", "See nodejs.org")
    with tempfile.TemporaryDirectory(prefix="quantmill-") as name:
        folder = Path(name)
        job_path, result_path = folder / "job.json", folder / "result.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        paths = (IN_NODE, package, job_path, result_path, *models)
        # --single-threaded: V8 does not compile wasm in other threads, whose time would count
        command = [node, "--single-threaded", *(str(path.resolve()) for path in paths)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {limit_s:.0f} s"}
        if not result_path.exists():
            return {"error": done.stderr.strip()[-300:] or f"exit code {done.returncode}"}
        return dict(json.loads(result_path.read_text(encoding="utf-8")))


def _run_in_browser(
    package: Path, models: Sequence[Path], job: dict[str, Any], limit_s: float
) -> dict[str, Any]:
    browser = find_browser()
    answered = threading.Event()
    answer: dict[str, Any] = {}

    def receive(body: bytes) -> None:
        answer.update(json.loads(body))
        answered.set()

    served = {
        "index.html": IN_BROWSER,
        "race.mjs": RACE,
        **{f"model/{i}": path for i, path in enumerate(models)},
        **{f"ort/{path.name}": path for path in (package / "dist").iterdir()},
        **{unquote(x["data"][1:]): Path(unquote(x["data"])) for x in chain(*job["external"])},
    }
    with (
        tempfile.TemporaryDirectory(prefix="quantmill-", ignore_cleanup_errors=True) as name,
        ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(_Handler, receive, directory=f"{name}/site")
        ) as server,
    ):
        for place, path in served.items():
            link = Path(name, "site", place)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        Path(name, "site", "job.json").write_text(json.dumps(job), encoding="utf-8")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser,
            "--headless=new",
            "--disable-gpu",
            f"--user-data-dir={name}/profile",
            # as root Chromium has no sandbox; the page is ours, and reads nothing from outside
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
            f"http://127.0.0.1:{server.server_port}/",
        ]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        try:
            if not answered.wait(limit_s):
                return {"error": f"no answer within {limit_s:.0f} s"}
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return answer


class _Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, and hands on what is posted."""

    def __init__(self, receive: Callable[[bytes], None], *arguments: Any, **named: Any) -> None:
        self.receive = receive
        super().__init__(*arguments, **named)

    def do_POST(self) -> None:
        self.receive(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def end_headers(self) -> None:
        # Isolated pages alone have threads, and a clock of 5 microseconds.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: the terminal is the user's."""


def _encode(x: NDArray[Any]) -> dict[str, Any]:
    """An array as race.mjs reads it. Raises: RequestError for one of texts."""
    if x.dtype.kind not in "fiub":
        raise RequestError(f"inputs of type {x.dtype} have no JavaScript form", "--runtime")
    data = base64.b64encode(np.ascontiguousarray(x).tobytes()).decode()
    return {"type": x.dtype.name, "dims": list(x.shape), "data": data}


def _decode_all(outputs: Mapping[str, Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    return {
        name: np.frombuffer(base64.b64decode(x["data"]), x["type"]).reshape(x["dims"])
        for name, x in outputs.items()
    }
