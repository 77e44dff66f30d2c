"""The command line that an answer suggests as the next one."""

from __future__ import annotations

import shlex
from pathlib import Path

from quant_core.data.spec import SampleSpec


def command_line(*words: str | Path) -> str:
    """A command line of quantmill, as it is typed."""
    return shlex.join(["quantmill", *map(_as_typed, words)])


def _as_typed(word: str | Path) -> str:
    """A path that begins with a dash would be read as an option."""
    is_like_option = isinstance(word, Path) and str(word).startswith("-")
    return f"./{word}" if is_like_option else str(word)


def detailed_validation(original: Path, quantized: Path, samples: SampleSpec) -> str:
    """The command line that says what each node costs on these samples."""
    words: list[str | Path] = ["--data", str(samples.source)]
    if samples.labels is not None:
        words += ["--labels", str(samples.labels)]
    return command_line("validate", original, quantized, *words, "--detailed")


def after_quantizing(
    model: Path, output: Path, calibration: SampleSpec | None, is_missed: bool
) -> str:
    """The next command line: with samples, what the model costs, or how it does on fresh ones, as
    those that calibrated say nothing of these.
    """
    if calibration is None or calibration.is_random:
        return command_line("quantize", model, "--data", "SAMPLES.npz")
    if is_missed:
        return detailed_validation(model, output, calibration)
    return command_line("validate", model, output, "--data", "FRESH_SAMPLES.npz")
