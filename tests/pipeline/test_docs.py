"""Every command and every block of code in README and in the documentation runs, page by page.

Pages are run in a folder that has what they speak of: a model and its data, a quantized file of
another tool, and a folder of models. A block whose title is a file's name is written to that file;
the blocks of a page run in the order in which they stand.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from flows.cli.commands import main as quantmill
from quant_core import quantize_with_calibration
from tests.folders import NAMES, WORDS, save_folder
from tests.store import BUCKET, credentials, s3_server

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments" / "docs" / "pages"
README = ROOT / "README.md"
PAGES = sorted(FOLDER.rglob("*.md"))
RUNNABLE = ("sh", "python", "yaml")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SERVICES = "runs until it is stopped"  # the title of commands that serve: their --help is tried
# These install, or take a minute: `.ci/run` runs them.
IN_CI = ("pip install", "pytest", "python -m flows.batch deployments/demo/manifest.yaml")
TIMES = ("benchmark", "compare", "explain")  # for three seconds, if nobody says how long
RUNS_A_BATCH = ("config", "batch")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title and its lines."""

    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a `sh` block as words, without comments and what `.ci/run` runs."""
        lines = [line.strip() for lines in self.text.splitlines() for line in lines.split("&&")]
        return [
            words
            for line in lines
            if not line.startswith(IN_CI) and (words := shlex.split(line, True))
        ]


def blocks_of(page: Path) -> list[Block]:
    blocks = [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]
    assert {block.language for block in blocks} <= {*RUNNABLE, "text"}
    return [block for block in blocks if block.language in RUNNABLE]


class Feeds(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.feeds = iter([{"image": image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def small_model(seed: int = 0) -> onnx.ModelProto:
    """image (n, 1, 8, 8) -> Conv -> Relu -> GlobalAveragePool -> Flatten -> Gemm -> (n, 10)."""
    rng = np.random.default_rng(seed)
    weights = {
        "stem.weight": rng.standard_normal((32, 1, 3, 3), dtype=np.float32),
        "classifier.weight": rng.standard_normal((32, 10), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "stem.weight"], ["c"], "/stem/Conv"),
        helper.make_node("Relu", ["c"], ["r"], "/stem/Relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "/pool"),
        helper.make_node("Flatten", ["p"], ["f"], "/flatten"),
        helper.make_node("Gemm", ["f", "classifier.weight"], ["digit"], "/classifier/Gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("digit", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with what the pages speak of; each page gets a copy."""
    folder = tmp_path_factory.mktemp("prepared")
    images = np.random.default_rng(1).standard_normal((64, 1, 8, 8), dtype=np.float32)
    data = folder / "demo" / "data" / "digits_cnn"
    data.mkdir(parents=True)
    models = folder / "demo" / "models"
    models.mkdir()
    (folder / "deployments").mkdir()
    (folder / "deployments" / "demo").symlink_to(folder / "demo")
    (folder / "models").symlink_to("demo/models")  # of each copy: a page writes there
    (folder / "data").symlink_to("demo/data")
    (folder / "more").mkdir()
    onnx.save(small_model(seed=3), folder / "more" / "third.onnx")
    onnx.save(small_model(), folder / "model.onnx")
    onnx.save(small_model(), models / "digits_cnn.onnx")
    onnx.save(small_model(seed=2), models / "other.onnx")
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    [scores] = session.run(None, {"image": images})
    for place in (folder, data):
        np.savez(place / "calibration.npz", image=images[:32])
        np.savez(place / "evaluation.npz", image=images)
        np.save(place / "labels.npy", scores.argmax(axis=-1))
    quantize_static(folder / "model.onnx", folder / "model_by_others.onnx", Feeds(images[:8]))
    save_folder(folder / "translator", names=(NAMES[0], NAMES[3]))
    texts = np.random.default_rng(1).integers(0, WORDS, (12, 9))
    np.savez(folder / "texts.npz", input_ids=texts, attention_mask=np.ones_like(texts))
    quantize_with_calibration(
        folder / "model.onnx", folder / "model_int8.onnx", folder / "calibration.npz"
    )
    return folder


@pytest.fixture
def store(prepared, monkeypatch):
    """A server that speaks S3, with the models of `demo/models` in s3://bucket/models."""
    with s3_server() as (url, _):
        for name, value in credentials(url).items():
            monkeypatch.setenv(name, value)
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        for path in (prepared / "demo" / "models").iterdir():
            files.put(str(path), f"{BUCKET}/models/{path.name}")
        yield
    files.clear_instance_cache()  # others have another server


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch):
    """The current folder of a page."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(words: list[str], scheduler: str) -> int:
    """Run one command line, batches on the cluster that is there; returns the exit code."""
    words = [word.replace("tcp://SCHEDULER:8786", scheduler) for word in words]
    on_cluster = ["--scheduler", scheduler, "--prefect", "inherit"]
    if words[0] == "quantmill":
        if words[1] in TIMES and "--seconds" not in words:
            words = [*words, "--seconds", "0.1"]
        is_batch = words[1] in RUNS_A_BATCH and "--dry-run" not in words
        return quantmill(words[1:] + (on_cluster if is_batch else []))
    if words[:3] == ["python", "-m", "flows.batch"]:
        given = [] if "--dry-run" in words else on_cluster
        given = given if "--scheduler" not in words else given[2:]
        return quantmill(["config", *words[3:], *given])
    if words[:2] == ["cp", "-r"]:
        shutil.copytree(*words[2:], dirs_exist_ok=True)
        return 0
    assert words[0] == "python", f"no test runs {shlex.join(words)}"
    return subprocess.run([sys.executable, *words[1:]], check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", list(filter(blocks_of, [README, *PAGES])), ids=lambda page: page.stem
)
def test_every_block_of_a_page_runs(page, folder, harness, request):
    if "s3://" in "".join(block.text for block in blocks_of(page)):
        request.getfixturevalue("store")
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if "." in block.title:
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.title == SERVICES:
            for words in block.commands:
                help_of = [sys.executable, "-m", *words[:2], "--help"]
                subprocess.run(help_of, check=True, capture_output=True)
        elif block.language == "sh":
            for words in block.commands:
                assert run_command(words, harness) == 0, shlex.join(words)
        elif block.language == "python":
            exec(compile(block.text, str(page), "exec"), names)


def test_links_of_readme_lead_to_files():
    """Those of the documentation are checked by `mkdocs build --strict`."""
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8").replace("\n", " "))

    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize(
    ("first", "page"), [("case", "results.md"), ("runtime | static INT8", "reference/runtimes.md")]
)
def test_the_tables_of_readme_are_excerpts_of_those_in_the_documentation(first, page):
    excerpt, whole = rows_of(README, first), rows_of(FOLDER / page, first)

    assert len(excerpt) > 4
    for name, cells in excerpt.items():
        assert {head: whole[name][head].partition(" / ")[0] for head in cells} == cells


def rows_of(page: Path, first: str) -> dict[str, dict[str, str]]:
    """First cell of a row -> heading -> cell, of the table whose headings begin so."""
    text = page.read_text(encoding="utf-8")
    table = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    headings, _, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def test_what_no_test_runs_is_run_by_the_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")

    assert [command for command in IN_CI if command not in script] == []


def test_every_page_stands_in_the_navigation():
    """And the other way round: mkdocs only warns of either."""
    text = (ROOT / "deployments" / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", text))

    assert listed == {page.relative_to(FOLDER).as_posix() for page in PAGES}
