"""Drafts a manifest for a folder of models: `quantmill init`.

Data are found by their names. A file belongs to the model whose name stands in its own or in its
folder's name (the longest such name), or to the only model of the folder; its other words say what
it is for. What the model does not take becomes a comment with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from flows.manifest.outputs import is_output, original_of
from quant_core.api import plan_model
from quant_core.data.input_spec import InputSpec
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import QuantError, RequestError
from quant_core.model.atomic import write_named
from quant_core.model.info import model_info
from quant_core.text import printable
from tasks.locations import MODELS

NAME = "quantmill.yaml"
HUGGINGFACE_HINT = (
    "# config.json looks like a model of Hugging Face: `quantmill batch DIR --layout huggingface` "
    "makes it as a whole."
)


class Role(StrEnum):
    """What a file of samples is for, as a manifest calls it."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"
    LABELS = "labels"


# The first role with a word in the name counts: `test_labels.npy` are labels.
ROLE_WORDS = {
    Role.LABELS: {"label", "labels", "target", "targets", "y"},
    Role.EVALUATION: {"evaluation", "eval", "test", "validation", "valid", "val"},
    Role.CALIBRATION: {"calibration", "calib", "train", "samples", "data"},
}


@dataclass(slots=True)
class DraftedModel:
    """A model of the folder, and the files that were found for it.

    inputs    what it is fed; nothing of a model that cannot be read
    obstacle  why it cannot be read or quantized, "" if it can
    rejected  files that name it and do not fit, with the reason
    """

    path: Path
    inputs: tuple[InputSpec, ...]
    obstacle: str = ""
    data: dict[Role, Path] = field(default_factory=dict)
    rejected: list[tuple[Path, str]] = field(default_factory=list)

    @property
    def is_usable(self) -> bool:
        return not self.obstacle

    @property
    def summary(self) -> str:
        """Its inputs, or why it is left out."""
        if self.obstacle:
            return f"left out: {self.obstacle}"
        return ", ".join(map(str, self.inputs))

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """Plain JSON values, with paths relative to `folder`."""
        return {
            "input": _relative(self.path, folder),
            "summary": self.summary,
            "is_usable": self.is_usable,
            **{str(role): _relative(path, folder) for role, path in self.data.items()},
            "rejected": [[_relative(path, folder), reason] for path, reason in self.rejected],
        }


def draft_manifest(folder: Path, output: Path | None = None) -> tuple[Path, list[DraftedModel]]:
    """Write a manifest for all models below `folder`; returns where, and what was found.

    output  the manifest; `quantmill.yaml` in the folder if None. It is never overwritten

    Raises: RequestError if there is no such folder, no model in it, or the manifest exists already
        or cannot be written.
    """
    output = output or folder / NAME
    if output.exists():
        raise RequestError("is there already", str(output), "Choose another name with -o")
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise RequestError(problem, str(folder), "Name a folder of .onnx models")
    paths = [path for path in _visible(folder, MODELS) if not is_output(path)]
    models = [_drafted(path) for path in paths]
    if not any(model.is_usable for model in models):
        unusable = f", and {len(models)} that cannot" if models else ""
        problem = f"holds no model that can be quantized{unusable}"
        raise RequestError(problem, str(folder), "Name a folder of .onnx models")
    for model, files in _files_by_model(models, folder):
        _give_data(model, files)
    hints = [HUGGINGFACE_HINT] if (folder / "config.json").is_file() else []
    write_named(output, manifest_text(models, output.parent, hints).encode())
    return output, models


def manifest_text(models: Iterable[DraftedModel], folder: Path, hints: Sequence[str]) -> str:
    """The manifest of these models, with paths relative to `folder`, where it will lie."""
    lines = [
        *hints,
        "# Run it with `quantmill config FILE`; --dry-run shows the plans and makes nothing.",
        "# Every option can stand here, for all models, or with one model.",
        "",
        "bits: 8  # 4: half the size again, and slower to load",
        "# A model that misses its contract is made all the same; row and exit code say so:",
        "# contract: {metric: agreement, min: 0.98}",
        "batch: {output_dir: quantized/, skip_existing: true}",
        "models:",
    ]
    for model in models:
        lines += _model_lines(model, folder)
    return "\n".join(lines) + "\n"


def _model_lines(model: DraftedModel, folder: Path) -> list[str]:
    entry = f"- input: {_quoted(model.path, folder)}  # {printable(model.summary)}"
    if not model.is_usable:
        return [f"  # {entry}"]
    lines = [f"  {entry}"]
    if Role.CALIBRATION in model.data:
        lines.append(f"    calibration: {{data: {_quoted(model.data[Role.CALIBRATION], folder)}}}")
    else:
        lines.append("    # calibration: {data: SAMPLES.npz}  # lets it compute in static integers")
    if Role.EVALUATION in model.data:
        evaluation = f"data: {_quoted(model.data[Role.EVALUATION], folder)}"
        if Role.LABELS in model.data:
            evaluation += f", labels: {_quoted(model.data[Role.LABELS], folder)}"
        lines.append(f"    evaluation: {{{evaluation}}}")
    for path, reason in model.rejected:
        lines.append(f"    # {_quoted(path, folder)} does not fit: {printable(reason)}")
    return lines


def _relative(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path.absolute())


def _quoted(path: Path, folder: Path) -> str:
    """A path as YAML reads it back: JSON's strings are YAML's."""
    text = _relative(path, folder)
    if re.fullmatch(r"[A-Za-z_][\w./-]*", text, re.ASCII):
        return text
    return json.dumps(text, ensure_ascii=text != printable(text))


def _drafted(path: Path) -> DraftedModel:
    original = original_of(path)
    if isinstance(original, Path) and original.is_file():
        return DraftedModel(path, (), f"made of {original.name}, by its name")
    try:
        if model_info(path).quantized:
            plan_model(path)  # fails, unless training left the scales and the weights are float
        return DraftedModel(path, tuple(input_specs(path)))
    except QuantError as error:
        return DraftedModel(path, (), error.problem)


def _files_by_model(
    models: Sequence[DraftedModel], folder: Path
) -> Iterator[tuple[DraftedModel, dict[Role, Path]]]:
    """Each model with its file for each role; with several for one role, the first by name."""
    found: list[dict[Role, Path]] = [{} for _ in models]
    for path in sorted([*_visible(folder, "*.npz"), *_visible(folder, "*.npy")]):
        names = [*path.relative_to(folder).parent.parts, path.stem]
        owners = [m for m in models if any(_holds(name, m.path.stem) for name in names)]
        longest = max((len(owner.path.stem) for owner in owners), default=0)
        for model, data in zip(models, found, strict=True):
            is_owner = model in owners and len(model.path.stem) == longest
            rest = re.sub(_whole(model.path.stem), " ", " ".join(names))
            if (is_owner or len(models) == 1) and (role := _role(rest)):
                data.setdefault(role, path)
    yield from zip(models, found, strict=True)


def _give_data(model: DraftedModel, found: Mapping[Role, Path]) -> None:
    """Give the model the files that it takes."""
    for role, path in found.items():
        if reason := _misfit(model, role, path, found):
            model.rejected.append((path, reason))
        else:
            model.data[role] = path


def _role(name: str) -> Role | None:
    words = set(re.findall(r"[a-z]+", name.lower()))
    return next((role for role, known in ROLE_WORDS.items() if words & known), None)


def _holds(name: str, stem: str) -> bool:
    """Whether the model's name stands in this one."""
    return re.search(_whole(stem), name) is not None


def _whole(stem: str) -> str:
    """The pattern of a model's name that is no part of a longer word."""
    return rf"(?<![^\W_]){re.escape(stem)}(?![^\W_])"


def _misfit(model: DraftedModel, role: Role, path: Path, found: Mapping[Role, Path]) -> str:
    """Why the model does not take the file; "" if it does."""
    if model.obstacle:
        return model.obstacle
    is_labels = role is Role.LABELS
    if is_labels and Role.EVALUATION not in found:
        return "labels of no evaluation data"
    source = found[Role.EVALUATION] if is_labels else path
    spec = SampleSpec(str(source), str(path) if is_labels else None)
    try:
        open_samples(spec, model.inputs, model.path)[0]
    except QuantError as error:
        return error.problem
    return ""


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files below the folder, sorted, without those in or with a name that starts with a dot."""
    return sorted(
        path
        for path in folder.rglob(pattern)
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
