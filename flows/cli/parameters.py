"""What the commands of `quantmill` take of their own: the arguments, and options of few commands.

Options that many commands share stand in options.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def argument(metavar: str, help: str) -> Any:
    """An argument that the help calls `metavar`."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def option(*flags: str, help: str, metavar: str | None = "FILE") -> Any:
    """An option of these flags, whose help shows no default."""
    return typer.Option(*flags, help=help, metavar=metavar, show_default=False)


Model = Annotated[Path, argument("MODEL", "A float ONNX model.")]
AnyModel = Annotated[Path, argument("MODEL", "An ONNX model, quantized or not.")]
Original = Annotated[Path, argument("ORIGINAL", "The float model.")]
Quantized = Annotated[Path, argument("QUANTIZED", "The quantized model.")]
Files = Annotated[
    list[Path], argument("QUANTIZED", "Quantized files of it, whichever tool made them.")
]
Models = Annotated[
    list[str], argument("MODELS", "Models, one folder or 'glob' of them, or one manifest.")
]
ManifestFile = Annotated[Path, argument("FILE", "A YAML or TOML manifest.")]
ModelFolder = Annotated[Path, argument("DIR", "A folder of models.")]
Reports = Annotated[Path, argument("DIR", "A batch's output folder.")]

Output = Annotated[
    Path | None,
    option(
        "-o",
        "--output",
        help="The file to write, replaced if it is there; without it, MODEL_int8.onnx (or _int4).",
    ),
]
Page = Annotated[Path | None, option("-o", "--output", help="Also write it as an HTML page.")]
OutputDir = Annotated[
    str | None, option("-o", "--output-dir", help="The folder to write to.", metavar="DIR")
]
Layout = Annotated[
    Literal["huggingface"] | None,
    option("--layout", help="MODELS is one folder of this layout, made as a whole.", metavar=None),
]
PlanFile = Annotated[Path | None, option("--plan", help="Follow this plan: the JSON of a dry run.")]
CostsFile = Annotated[
    Path | None,
    option(
        "--costs",
        help="File of timings, looked up and added to: with it the same input gives the same file.",
    ),
]
Rebuild = Annotated[
    bool, typer.Option("--rebuild", help="First write the Parquet again from the journal.")
]
RunId = Annotated[
    str | None, option("--run", help="Show the run of this id, not the latest.", metavar="ID")
]

SkipExisting = Annotated[
    bool | None,
    option(
        "--skip-existing/--no-skip-existing",
        help="Whether outputs that are up to date stay. Default: skip-existing",
        metavar=None,
    ),
]
ContinueOnError = Annotated[
    bool | None,
    option(
        "--continue-on-error/--stop-on-error",
        help="What happens when a model fails. Default: continue-on-error",
        metavar=None,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and stop.")]
OptimizeOnly = Annotated[
    bool, typer.Option("--optimize-only", help="Only rewrite the float model exactly.")
]
Export = Annotated[
    Literal["openvino"] | None,
    typer.Option("--export", help="Also write .xml and .bin for OpenVINO, and check them there."),
]
Provider = Annotated[
    str,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="Execution provider of both, such as cpu, cuda or openvino",
    ),
]
Pareto = Annotated[
    bool,
    typer.Option(
        "--pareto", help="Try all plans that may be best, and show those that none beats."
    ),
]
Detailed = Annotated[bool, typer.Option("--detailed", help="Say what each node costs.")]
Threads = Annotated[
    list[int],
    typer.Option(
        "--threads", min=1, max=1024, metavar="N", help="Threads of each model; repeatable."
    ),
]
ThreadCount = Annotated[
    int, typer.Option("--threads", min=1, max=1024, metavar="N", help="Threads to run on.")
]
BatchSizes = Annotated[
    list[int],
    typer.Option("--batch", min=1, max=65536, metavar="N", help="Samples in a feed; repeatable."),
]
MaxSlowdown = Annotated[
    float,
    typer.Option(
        "--max-slowdown",
        min=0,
        max=1,
        metavar="SHARE",
        help="Share of a speed-up that may be lost.",
    ),
]
Seconds = Annotated[
    float,
    typer.Option("--seconds", min=0.1, max=3600, metavar="S", help="How long to measure."),
]
Runtime = Annotated[
    Literal["python", "node", "web", "wasm"],
    typer.Option(
        "--runtime",
        help="onnxruntime in Python or node; onnxruntime-web in Chromium (web) or node (wasm).",
    ),
]
ManifestOutput = Annotated[
    Path | None,
    option("-o", "--output", help="The manifest to write; DIR/quantmill.yaml if left out."),
]
