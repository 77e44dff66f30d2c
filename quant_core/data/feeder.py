"""What a graph is fed that is one of several of a model: the samples, and what flows into it.

    graph                    reads                                  gives
    encoder_model            input_ids, attention_mask              last_hidden_state
    decoder_model            input_ids, encoder_hidden_states       logits, present.*
    decoder_with_past_model  input_ids, past_key_values.*           logits, present.*
    decoder_model_merged     all of these, and use_cache_branch     logits, present.*
    model (a decoder alone)  input_ids, past_key_values.*           logits, present.*

The samples are arrays under the names of the whole model, in which the tokens of a decoder behind
an encoder are `decoder_input_ids`. Each input of a graph is fed

1. the array of its name, if the samples have one;
2. the output of its name of a graph before, which runs in float;
3. what follows from the rest: masks of ones, positions, an empty past, or the past that the decoder
   left when it ran on the tokens before;
4. random values, if the samples are random.

Tokens of a decoder behind an encoder that nobody gives are those that it finds most likely.

Source: optimum-onnx, optimum/exporters/onnx/base.py, OnnxSeq2SeqConfigWithPast:
`torch_to_onnx_input_map` and `add_past_key_values`; optimum/onnxruntime/modeling_seq2seq.py,
`ORTDecoderForSeq2Seq.forward`: the first past is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from quant_core.data.fit import fit
from quant_core.data.following import (
    ENCODED,
    FIRST,
    PAST,
    PRESENT,
    Graph,
    Step,
    following,
    follows,
)
from quant_core.data.input_spec import InputSpec, describe_inputs
from quant_core.data.random_feeds import COUNT, first_strategy, random_source
from quant_core.data.sources import Source, open_some
from quant_core.data.spec import RANDOM, Flow, SampleSpec
from quant_core.errors import DataError
from quant_core.model.session import Feed
from quant_core.model.values import Tensors

TOKENS = 8  # at most so many are written by a decoder
EMBEDDED = "inputs_embeds"


class Feeder:
    """Makes the feeds of the last of several graphs.

    starter        the graph that runs on the first tokens: a decoder before, else the last itself
    tokens         the name of the tokens that a decoder goes on from; None: the last is no decoder
    has_two_feeds  whether the last graph can both begin and go on
    """

    def __init__(self, graphs: Sequence[Graph], flow: Flow, spec: SampleSpec) -> None:
        """Raises: DataError if the samples cannot be read, or fit no input."""
        self.target, self.before, self.seed = graphs[-1], graphs[:-1], spec.seed
        self.start, self.sizes = flow.start, flow.sizes
        self.starter = next((graph for graph in self.before if graph.gives_past), self.target)
        self.tokens = _tokens(graphs)
        self.has_two_feeds = self.target.takes_past and self.starter is self.target
        self.sample_inputs = _sample_inputs(graphs)
        self.name, self.samples = RANDOM, spec.count or COUNT
        self.given: Source | None = None
        if not spec.is_random:
            self.given = open_some(spec.source, self.sample_inputs)
            self.name = self.given.name
            self.samples = min(self.given.length, spec.count or self.given.length)
        self.drawn: dict[tuple[Path, tuple[str, ...]], Source] = {}

    def feed(self, sample: int, *, begins: bool) -> Feed:
        """What the last graph is fed of a sample.

        begins  at the first tokens, if the graph can both begin and go on

        Raises: DataError or ModelError if a graph does not run on what it is fed.
        """
        values = self._given_values(sample)
        name = self.tokens
        if name is None:
            return self._feed(self.target, values, sample)
        if name not in values and self.target.is_behind_encoder and name in self.starter.inputs:
            values[name] = self._written_tokens(name, values, sample)
        if not self.target.takes_past or (begins and self.has_two_feeds):
            return self._feed(self.target, values, sample)
        outputs = self.starter.run(self._feed(self.starter, values, sample))
        tokens = values[name]
        _go_on(values, name, _next_token(outputs, tokens))
        presents = {key: array for key, array in outputs.items() if PRESENT.search(key)}
        return self._feed(self.target, values, sample, Step(tokens.shape[1], presents))

    def _given_values(self, sample: int) -> Tensors:
        """The arrays of a sample by their names in the whole model."""
        if self.given is None:
            return {}
        found = self.given.read(sample * self.given.length // self.samples)
        if list(found) == [""]:
            return {self.sample_inputs[0].name: found[""]}
        return dict(found)

    def _written_tokens(self, name: str, values: Tensors, sample: int) -> np.ndarray:
        """The token that a decoder begins with, and those that it finds most likely after it."""
        spec = self.starter.inputs[name]
        self._run_before(self.starter, values, sample)
        if self.start is None:
            tokens = self._draw(self.starter, (name,), sample)[name][:, :1]
        else:
            batch = len(values[ENCODED]) if ENCODED in values else 1
            tokens = np.full((batch, 1), self.start, spec.dtype)
        length = spec.shape[1] if len(spec.shape) == 2 else None
        wanted = length if isinstance(length, int) else TOKENS - sample % TOKENS
        while tokens.shape[1] < wanted:
            outputs = self.starter.run(self._feed(self.starter, {**values, name: tokens}, sample))
            tokens = np.concatenate([tokens, _next_token(outputs, tokens)], axis=1)
        return tokens

    def _feed(self, graph: Graph, values: Tensors, sample: int, step: Step = FIRST) -> Feed:
        """A feed for a graph. What is run or drawn for it is added to `values`."""
        self._run_before(graph, values, sample)
        unknown = tuple(name for name in graph.inputs if name not in values)
        is_drawn_alone = self.given is None and len(unknown) == len(graph.inputs)
        if not is_drawn_alone or (self.tokens is not None and graph.takes_past):
            unknown = tuple(name for name in unknown if not follows(graph.inputs[name]))
        if unknown and self.given is not None:
            specs = [graph.inputs[name] for name in unknown]
            problem = f"lacks {', '.join(unknown)}"
            raise DataError(problem, self.name, f"{graph.path.name} takes {describe_inputs(specs)}")
        if unknown:
            values.update(self._draw(graph, unknown, sample))
        where = f"{self.name}, sample {sample}, {graph.path.name}"
        feed = {}
        for name, spec in graph.inputs.items():
            array = values[name] if name in values else following(spec, graph, values, step)
            feed[spec.name] = fit(array, spec, where)
        return feed

    def _run_before(self, graph: Graph, values: Tensors, sample: int) -> None:
        """Add the outputs of the graphs before that this one reads, and that are not known yet."""
        for other in self.before:
            if other is graph:
                return
            reads = [name for name in graph.inputs if name in other.outputs and name not in values]
            if reads and not other.gives_past:
                outputs = other.run(self._feed(other, values, sample))
                values.update({name: outputs[name] for name in reads})

    def _draw(self, graph: Graph, names: tuple[str, ...], sample: int) -> Feed:
        """Random values of these inputs of a graph. If they are all, the graph runs on them."""
        key = graph.path, names
        if key not in self.drawn:
            specs = tuple(_sized(graph.inputs[name], self.sizes.get(name, ())) for name in names)
            draw = random_source if len(names) == len(graph.inputs) else first_strategy
            self.drawn[key] = draw(specs, self.samples, self.seed, graph.path)
        found = self.drawn[key].read(sample)
        return {name: found[graph.inputs[name].name] for name in names}


def _tokens(graphs: Sequence[Graph]) -> str | None:
    """The name of a decoder's tokens, which a graph before may look up in their table."""
    target = graphs[-1]
    if not (target.takes_past or target.is_behind_encoder):
        return None
    if "decoder_input_ids" in target.inputs:
        return "decoder_input_ids"
    return "input_ids" if any("input_ids" in graph.inputs for graph in graphs) else None


def _sample_inputs(graphs: Iterable[Graph]) -> tuple[InputSpec, ...]:
    """What samples of a model of these graphs may hold, by the names of the whole model."""
    found: dict[str, InputSpec] = {}
    for graph in graphs:
        for name, spec in graph.inputs.items():
            if not PAST.search(name):
                found.setdefault(name, replace(spec, name=name))
    return tuple(found.values())


def _sized(spec: InputSpec, sizes: Sequence[int]) -> InputSpec:
    """The input with these sizes for its last axes, where they are open."""
    before = len(spec.shape) - len(sizes)
    if before < 0:
        return spec
    last = zip(spec.shape[before:], sizes, strict=True)
    pinned = tuple(old if isinstance(old, int) else new for old, new in last)
    return replace(spec, shape=(*spec.shape[:before], *pinned))


def _go_on(values: Tensors, name: str, token: np.ndarray) -> None:
    """Replace the tokens by the next one, and drop what was computed from the old ones."""
    values[name] = token
    for made in (EMBEDDED, "position_ids", "cache_position"):
        values.pop(made, None)
    mask = name.replace("input_ids", "attention_mask")
    if mask in values:
        values[mask] = np.concatenate([values[mask], np.ones_like(token, values[mask].dtype)], 1)


def _next_token(outputs: Feed, tokens: np.ndarray) -> np.ndarray:
    """The most likely token after these, (N, 1); the last one again where no logits say it."""
    logits = outputs.get("logits")
    if logits is None or logits.ndim != 3:
        return tokens[:, -1:]
    likely: np.ndarray = logits[:, -1:].argmax(axis=-1)
    return likely.astype(tokens.dtype)
