"""Options become values: of a config, of samples, of a contract."""

from __future__ import annotations

import json
import shlex

import pytest
import typer

from flows.cli import groups, options
from flows.cli.checks import changed_options
from flows.cli.command import Answer, register
from flows.report.details import details
from flows.report.elements import Element
from quant_core.config import Contract, QuantConfig
from quant_core.data.spec import SampleSpec

# No option has its default.
CONFIG = QuantConfig(
    bits=4,
    mode="static",
    method="percentile",
    percentile=99.5,
    per_channel=False,
    symmetric=False,
    block_size=64,
    weight_method="rtn",
    bias_correction=False,
    exclude=("a*", "b"),
    layer_bits={"head": 32, "x=y": 8},
    min_elements=9,
    target="arm64",
    runtime="qdq",
    float_storage="float16",
    qat="replace",
    optimize=False,
    fix_shape={"batch": 1, "x:0:2": 224, "a=b": 3},
    prune="zero-channels",
    floor_db=20.0,
    time_budget_s=60.0,
    provider="cuda",
)


@pytest.fixture
def typed():
    """A command that takes every group; running it returns what the options became."""
    app, seen = typer.Typer(), {}

    def probe(config: QuantConfig, samples: SampleSpec, accuracy: groups.AccuracyOptions) -> Answer:
        """Probe."""
        seen.update(config=config, samples=samples, accuracy=accuracy)
        return Answer({}, lambda data: "")

    register(app, probe)

    def run(*arguments):
        with pytest.raises(SystemExit) as done:
            app(list(arguments), prog_name="probe")
        return done.value.code, seen

    return run


def test_options_that_are_not_typed_leave_every_default(typed):
    code, seen = typed()

    assert code == 0
    assert seen["config"] == QuantConfig()
    assert seen["samples"] == SampleSpec()
    assert seen["accuracy"] == groups.AccuracyOptions()


def test_every_option_of_a_config_can_be_typed(typed):
    line = (
        "--bits 4 --mode static --method percentile --percentile 99.5 --per-tensor --asymmetric"
        " --block-size 64 --weight-method rtn --no-bias-correction --exclude a* --exclude b"
        " --layer-bits head=32 --layer-bits x=y=8 --min-elements 9 --target arm64 --runtime qdq"
        " --fix-shape batch=1,x:0:2=224 --fix-shape a=b=3 --float-storage float16 --qat replace"
        " --no-optimize --prune zero-channels --floor-db 20 --time-budget 60 --provider cuda"
    )

    code, seen = typed(*line.split())

    assert code == 0
    assert seen["config"] == CONFIG
    assert set(changed_options(CONFIG)) == set(options.CONFIG) == set(QuantConfig.__slots__)


def test_the_command_on_a_report_page_has_the_options_of_its_model(typed):
    row = {"outcome": "done", "verdict": "met", "input": "a.onnx", "output": "b.onnx"}

    parts = details({**row, "config": json.dumps(CONFIG.to_dict())}, [], [], [])

    words = shlex.split(code_in(parts))
    code, seen = typed(*words[words.index("CALIBRATION") + 1 :])
    assert code == 0
    assert seen["config"] == CONFIG


def code_in(parts) -> str:
    """The text of the first element `code`."""
    for part in parts:
        if isinstance(part, Element):
            if part.tag == "code":
                return part.children[0]
            if text := code_in(part.children):
                return text
    return ""


def test_samples_and_a_contract_can_be_typed(typed):
    line = (
        "--data d.npz --labels l.npy --num-samples 5 --shape x=1,3,8,8 --shape y=1,2"
        " --metric top1 --max-drop 0.01"
    )

    code, seen = typed(*line.split())

    assert code == 0
    assert seen["samples"].source == "d.npz"
    assert seen["samples"].shape == {"x": [1, 3, 8, 8], "y": [1, 2]}
    assert seen["accuracy"].contract == Contract("top1", max_drop=0.01)


def test_a_metric_without_a_promise_is_only_measured(typed):
    _, seen = typed("--metric", "cosine")

    assert seen["accuracy"] == groups.AccuracyOptions("cosine", None)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("--bits 5", ["--bits", "is 5", "8, 4"]),
        ("--method entrpy", ["--method", "entropy"]),
        ("--min-elements -1", ["--min-elements", "0 or more"]),
        ("--layer-bits head", ["--layer-bits", "GLOB=BITS"]),
        ("--layer-bits head=5", ["--layer-bits head", "is 5", "32, 16, 8, 4"]),
        ("--fix-shape batch", ["--fix-shape", "NAME=SIZE"]),
        ("--fix-shape batch=0", ["--fix-shape batch", "1 or more"]),
        ("--target x68", ["--target", "x86"]),
        ("--metric accuracy --min 1", ["--metric", "top1"]),
        ("--metric accuracy", ["--metric", "top1"]),
        ("--metric sqnr --max-drop 1", ["--max-drop", "Set min"]),
        ("--time-budget 0", ["--time-budget is 0"]),
        ("--num-samples 0", ["--num-samples", "1 or more"]),
        ("--shape 1,a", ["--shape", "'1,a'", "224"]),
        ("--shape 1,2 --shape x=1", ["--shape", "INPUT="]),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(typed, capsys, line, parts):
    code, _ = typed(*line.split())

    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("line", ["--bitz 8", "--bits eight", "stray"])
def test_a_mistyped_line_has_exit_code_2(typed, line):
    code, _ = typed(*line.split())

    assert code == 2
