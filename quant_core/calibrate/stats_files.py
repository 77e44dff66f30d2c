"""Statistics as files: what one process measured, for another to merge."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quant_core.calibrate.stats import ChannelMoments, Statistic, TensorStats
from quant_core.errors import DataError

_KINDS: tuple[type[TensorStats], type[ChannelMoments]] = (TensorStats, ChannelMoments)


def save_stats(path: Path | str, stats: Mapping[str, Statistic], samples: Sequence[int]) -> None:
    """One .npz file of a few arrays, whose bytes depend on its arguments alone.

    samples  how many each part of the statistics is of
    """
    names = sorted(stats)
    packed = [stats[name].pack() for name in names]
    floats = [p[0] for p in packed]
    integers = [p[1] for p in packed]
    with Path(path).open("wb") as file:
        np.savez(
            file,
            samples=np.array(samples, np.int64),
            names=np.array(names, np.str_),
            kinds=np.array([_KINDS.index(type(stats[name])) for name in names], np.int64),
            float_sizes=np.array([f.size for f in floats], np.int64),
            floats=np.concatenate([np.zeros(0), *floats]),
            integer_sizes=np.array([i.size for i in integers], np.int64),
            integers=np.concatenate([np.zeros(0, np.int64), *integers]),
        )


def load_stats(path: Path | str) -> tuple[dict[str, Any], list[int]]:
    """The mapping that `save_stats` wrote, in the order of the names, and the numbers of samples.

    Raises: DataError if the file is missing, truncated or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            floats = np.split(file["floats"], np.cumsum(file["float_sizes"]))
            integers = np.split(file["integers"], np.cumsum(file["integer_sizes"]))
            kinds = file["kinds"].tolist()
            names = file["names"].tolist()
            samples = list(map(int, file["samples"]))
        found = {
            n: _KINDS[k].unpack(f, i)
            for n, k, f, i in zip(names, kinds, floats, integers, strict=False)
        }
        return found, samples
    except (OSError, EOFError, ValueError, LookupError, TypeError, zipfile.BadZipFile) as error:
        problem = f"no calibration statistics: {error}"
        raise DataError(problem, str(path), "Calibrate again") from error
