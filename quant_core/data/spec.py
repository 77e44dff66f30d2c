"""Which samples a model is fed, as a value that a manifest, a journal and a worker can pass on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from quant_core.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RANDOM = "random"

SampleSource = Union[
    str,
    Path,
    "NDArray[Any]",
    Mapping[str, "NDArray[Any]"],
    Iterable[Union[Mapping[str, "NDArray[Any]"], "NDArray[Any]"]],
]
SampleLabels = Union[str, Path, "NDArray[Any]"]
SampleShape = Mapping[str, Sequence[int]] | Sequence[int]


@dataclass(frozen=True, slots=True)
class Flow:
    """What reaches a graph that is one of several of a model (data/flow.py).

    before  files of the float graphs whose outputs it may read, in the order in which they run
    start   the token that the decoder begins with; None: one that is drawn
    sizes   input -> sizes of its last axes, for those of random samples that are open
    """

    before: tuple[str, ...] = ()
    start: int | None = None
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Flow:
        """The inverse of `dataclasses.asdict`, also from JSON."""
        sizes = {name: tuple(axes) for name, axes in values["sizes"].items()}
        return cls(tuple(values["before"]), values["start"], sizes)


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """The samples of a source, how many of them, and their labels; `open_samples` reads them.

    source  .npy              the samples of a single-input model
            .npz              one array per input (a single-input model: any name)
            folder of them    one feed per file, in the order of the names, fed as stored
            "random"          seeded values that the model runs on: normal floats, indices within
                              tables, lengths, masks; to try a model, not to calibrate it
            array, mapping of arrays, iterable of feeds: the same, from Python; a feed of a
                              single-input model may be its array
            If an array has the input's rank, its first axis is the sample, and each feed takes as
            many samples as the model's batch axis is fixed to (else 1; a remainder is left out).
            If an array has one axis more, or is an array for a scalar input, each element is a
            feed. A scalar is fed every time.
    labels  .npy or array whose first axis counts the samples of the whole source
    count   at most this many samples (of a folder: files; of an iterable: feeds), spread evenly
            over the source, so that data sorted by class keep every class
    shape   sizes of symbolic axes: {input: sizes}, or the sizes of a single-input model; the batch
            axis may be left out
    seed    of random samples
    flow    the samples are of a model of several graphs, of which this is one; None: of this graph

    Raises: DataError if count is below 1, seed below 0, or a size is not a whole number.
    """

    source: SampleSource = RANDOM
    labels: SampleLabels | None = None
    count: int | None = None
    shape: SampleShape | None = None
    seed: int = 0
    flow: Flow | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise DataError(f"count is {self.count}", hint="At least 1 sample")
        if self.seed < 0:
            raise DataError(f"seed is {self.seed}", hint="0 or more")
        shapes = self.shape.values() if isinstance(self.shape, Mapping) else [self.shape or ()]
        for sizes in shapes:
            if not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise DataError(f"is {list(sizes)}", "shape", "Sizes are whole numbers")

    @property
    def is_random(self) -> bool:
        """Whether the samples are drawn."""
        return isinstance(self.source, str) and self.source == RANDOM

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, if the source and the labels are paths; `from_dict` reads them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["flow"] = asdict(self.flow) if self.flow else None
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SampleSpec:
        """The inverse of `to_dict`; keys that are absent have their defaults."""
        flow = values.get("flow")
        if flow is None:
            return cls(**values)
        return cls(**{**values, "flow": Flow.from_dict(flow)})

    def files(self) -> tuple[tuple[str, str], ...]:
        """The files that must exist, each with the manifest's key for it: data and labels."""
        paths = (("data", self.source), ("labels", self.labels))
        return tuple(
            (key, str(path))
            for key, path in paths
            if isinstance(path, (str, Path)) and path != RANDOM
        )
