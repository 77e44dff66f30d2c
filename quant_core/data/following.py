"""Inputs of a graph of several that follow from its other inputs: masks, positions, the past."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from quant_core.data.input_spec import InputSpec
from quant_core.errors import DataError
from quant_core.model.session import Feed, run

ENCODED = "last_hidden_state"
PAST, PRESENT = re.compile(r"^past"), re.compile(r"^present")
BEHIND_ENCODER = re.compile(r"^encoder_(hidden_states|outputs|attention_mask)$|\.encoder\.")


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """A float graph that can be run.

    inputs  name in the whole model -> input
    """

    path: Path
    session: ort.InferenceSession
    inputs: Mapping[str, InputSpec]
    outputs: tuple[str, ...]

    @property
    def is_behind_encoder(self) -> bool:
        """Whether it reads what an encoder gives."""
        return any(BEHIND_ENCODER.search(spec.name) for spec in self.inputs.values())

    @property
    def takes_past(self) -> bool:
        """Whether it goes on from tokens that were read before."""
        return any(PAST.search(name) for name in self.inputs)

    @property
    def gives_past(self) -> bool:
        """Whether it leaves what the next run goes on from."""
        return any(PRESENT.search(name) for name in self.outputs)

    def run(self, feed: Feed) -> Feed:
        """The outputs by name. Raises: ModelError if the graph does not run on the feed."""
        outputs = run(self.session, feed, str(self.path))
        return dict(zip(self.outputs, outputs, strict=True))


@dataclass(frozen=True, slots=True)
class Step:
    """Where a decoder stands: at its first tokens, or at the one after `past` tokens.

    presents  what it left when it ran on these, by the name of the output
    """

    past: int = 0
    presents: Mapping[str, np.ndarray] = field(default_factory=dict)


FIRST = Step()


def follows(spec: InputSpec) -> bool:
    """Whether the input can be made of the others."""
    return any(re.search(pattern, spec.name) for pattern, _ in FOLLOWS)


def following(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    """The value of an input that follows from the others, which `values` has as far as known.

    Raises: DataError if it is a past that no graph before has left.
    """
    rule = next(rule for pattern, rule in FOLLOWS if re.search(pattern, spec.name))
    return rule(spec, graph, values, step)


def _past(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    """What the decoder left, or at the first tokens a past of length 0."""
    if step is FIRST:
        batch, _ = _sizes(graph, values)
        sizes = [size if isinstance(size, int) else 0 for size in spec.shape]
        if spec.shape and not isinstance(spec.shape[0], int):
            sizes[0] = batch
        return np.zeros(sizes, spec.dtype)
    for present in ("present", "present_key_values"):
        name = re.sub("^past(_key_values)?", present, spec.name)
        if name in step.presents:
            return step.presents[name]
    raise DataError(f"no graph before gives {spec.name}", str(graph.path), f"It takes {spec}")


def _branch(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    return np.full([1] * len(spec.shape), step is not FIRST, spec.dtype)


def _mask(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    """Ones for every step of the encoder's output, or of the past and the tokens."""
    batch, new = _sizes(graph, values)
    if not spec.name.startswith("encoder"):
        return np.ones((batch, step.past + new), spec.dtype)
    if ENCODED in values:
        return np.ones(values[ENCODED].shape[:2], spec.dtype)
    crossed = next(array for name, array in step.presents.items() if ".encoder." in name)
    return np.ones((batch, crossed.shape[2]), spec.dtype)


def _positions(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    batch, new = _sizes(graph, values)
    positions = np.arange(step.past, step.past + new, dtype=spec.dtype)
    return positions if len(spec.shape) == 1 else np.tile(positions, (batch, 1))


def _zeros(spec: InputSpec, graph: Graph, values: Feed, step: Step) -> np.ndarray:
    return np.zeros(_sizes(graph, values) if spec.shape else (), spec.dtype)


# Pattern of the name of an input -> how it follows.
FOLLOWS: tuple[tuple[str, Callable[[InputSpec, Graph, Feed, Step], np.ndarray]], ...] = (
    (PAST.pattern, _past),
    (r"^use_cache_branch$", _branch),
    (r"^(encoder_|decoder_)?attention_mask$", _mask),
    (r"^(position_ids|cache_position)$", _positions),
    (r"^(token_type_ids|num_logits_to_keep|logits_to_keep)$", _zeros),
)


def _sizes(graph: Graph, values: Feed) -> tuple[int, int]:
    """How many samples and how many steps the graph is fed at once, without a past."""
    main = [
        values[name]
        for name in graph.inputs
        if name in values and name != ENCODED and values[name].ndim >= 2 and "mask" not in name
    ]
    return (main[0].shape[0], main[0].shape[1]) if main else (1, 1)
