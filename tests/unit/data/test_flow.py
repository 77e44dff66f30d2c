"""What flows from one graph of a model into the next is what the float graphs give."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from quant_core.data.inputs import input_specs
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import RANDOM, Flow, SampleSpec
from quant_core.errors import DataError
from quant_core.model.session import open_session, run
from tests.folders import NAMES, START, WORDS, decoder_alone, save_folder
from tests.models import sketch

ENCODER, DECODER, WITH_PAST, MERGED = NAMES
BEFORE = {ENCODER: (), DECODER: (ENCODER,), WITH_PAST: (ENCODER, DECODER), MERGED: (ENCODER,)}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "model"
    save_folder(folder)
    return folder / "onnx"


@pytest.fixture
def given(tmp_path):
    """The path of samples of five texts."""
    rng = np.random.default_rng(0)
    texts = rng.integers(0, WORDS, (5, 7))
    mask = np.ones((5, 7), np.int64)
    mask[:, 5:] = 0
    np.savez(tmp_path / "texts.npz", input_ids=texts, attention_mask=mask)
    return str(tmp_path / "texts.npz")


def flowing(graphs, name: str, source: str = RANDOM, **options) -> Samples:
    before = tuple(str(graphs / f"{other}.onnx") for other in BEFORE[name])
    file = graphs / f"{name}.onnx"
    spec = SampleSpec(source, flow=Flow(before, START), **options)
    return open_samples(spec, input_specs(file), file)


def outputs(graphs, name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = open_session(graphs / f"{name}.onnx")
    names = [node.name for node in session.get_outputs()]
    return dict(zip(names, run(session, feed), strict=True))


@pytest.mark.parametrize("is_given", [True, False])
def test_a_decoder_reads_what_the_encoder_gives_on_the_same_sample(graphs, given, is_given):
    source = given if is_given else RANDOM

    encoder, decoder = flowing(graphs, ENCODER, source), flowing(graphs, DECODER, source)

    for k in range(len(encoder)):
        hidden = outputs(graphs, ENCODER, encoder[k])["last_hidden_state"]
        np.testing.assert_array_equal(decoder[k]["encoder_hidden_states"], hidden)
        mask = encoder[k]["attention_mask"]
        np.testing.assert_array_equal(decoder[k]["encoder_attention_mask"], mask)


def test_a_decoder_writes_the_tokens_that_it_finds_most_likely(graphs, given):
    feed = flowing(graphs, DECODER, given)[0]

    logits = outputs(graphs, DECODER, feed)["logits"]

    assert feed["input_ids"][0, 0] == START
    np.testing.assert_array_equal(feed["input_ids"][0, 1:], logits[0, :-1].argmax(axis=-1))


def test_a_graph_before_that_does_not_load_does_not_keep_the_others_from_flowing(graphs, tmp_path):
    """A folder may hold a tokenizer, of operators of an extension of onnxruntime."""
    text = "(string[n] text) => (int64[n, m] ids) { ids = ai.onnx.contrib.BertTokenizer(text) }"
    onnx.save(sketch(text), tmp_path / "tokenizer.onnx")
    before = (str(tmp_path / "tokenizer.onnx"), str(graphs / f"{ENCODER}.onnx"))
    file = graphs / f"{DECODER}.onnx"

    samples = open_samples(SampleSpec(flow=Flow(before, START)), input_specs(file), file)

    expected = flowing(graphs, DECODER)[0]["encoder_hidden_states"]
    np.testing.assert_array_equal(samples[0]["encoder_hidden_states"], expected)


def test_the_past_is_that_of_the_tokens_before(graphs, given):
    begins, goes_on = flowing(graphs, DECODER, given)[0], flowing(graphs, WITH_PAST, given)[0]
    tokens = np.concatenate([begins["input_ids"], goes_on["input_ids"]], axis=1)

    whole = outputs(graphs, DECODER, {**begins, "input_ids": tokens})["logits"][:, -1]
    next_one = outputs(graphs, WITH_PAST, goes_on)["logits"][:, -1]

    np.testing.assert_allclose(next_one, whole, atol=1e-4)


def test_a_merged_decoder_is_fed_for_both_of_its_branches(graphs, given):
    samples = flowing(graphs, MERGED, given)

    for k, feed in enumerate(samples):
        uses_cache = bool(feed["use_cache_branch"][0])
        name = WITH_PAST if uses_cache else DECODER
        same = flowing(graphs, name, given)[k % 5]
        taken = {key: feed[key] for key in same}
        assert uses_cache == (k < 5)
        np.testing.assert_array_equal(
            outputs(graphs, MERGED, feed)["logits"], outputs(graphs, name, taken)["logits"]
        )


def test_given_tokens_of_the_decoder_are_its_first_ones(graphs, tmp_path):
    texts, answers = np.full((3, 6), 5), np.arange(12).reshape(3, 4)
    np.savez(tmp_path / "both.npz", input_ids=texts, decoder_input_ids=answers)

    decoder = flowing(graphs, DECODER, str(tmp_path / "both.npz"))
    goes_on = flowing(graphs, WITH_PAST, str(tmp_path / "both.npz"))

    assert [feed["input_ids"].tolist() for feed in decoder] == [[row] for row in answers.tolist()]
    assert {feed["past_key_values.0.decoder.key"].shape[2] for feed in goes_on} == {4}


def test_a_mask_that_is_not_given_hides_nothing(graphs, tmp_path):
    np.savez(tmp_path / "texts.npz", input_ids=np.full((3, 6), 5))

    feed = flowing(graphs, ENCODER, str(tmp_path / "texts.npz"))[0]

    assert feed["attention_mask"].tolist() == [[1] * 6]


def test_given_samples_without_an_input_of_the_encoder_are_refused(graphs, tmp_path):
    np.savez(tmp_path / "mistyped.npz", attention_mask=np.ones((3, 6), np.int64))

    with pytest.raises(DataError, match=r"lacks input_ids.*encoder_model"):
        flowing(graphs, MERGED, str(tmp_path / "mistyped.npz"))


def test_fewer_samples_are_spread_over_the_given_ones(graphs, given):
    few = flowing(graphs, ENCODER, given, count=2)

    every = flowing(graphs, ENCODER, given)
    assert [feed["input_ids"].tolist() for feed in few] == [
        every[k]["input_ids"].tolist() for k in (0, 2)
    ]


def test_a_language_model_begins_without_a_past_and_goes_on_from_its_own(tmp_path):
    onnx.save(decoder_alone(), tmp_path / "model.onnx")
    file = tmp_path / "model.onnx"
    np.savez(tmp_path / "texts.npz", input_ids=np.random.default_rng(0).integers(0, WORDS, (2, 5)))
    spec = SampleSpec(str(tmp_path / "texts.npz"), flow=Flow())

    samples = open_samples(spec, input_specs(file), file)

    goes_on, begins = samples[0], samples[2]
    assert begins["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert begins["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert goes_on["past_key_values.0.key"].shape == (1, 2, 5, 16)
    assert goes_on["position_ids"].tolist() == [[5]]
    assert goes_on["attention_mask"].shape == (1, 6)
    session = open_session(file)
    begun, _, _ = run(session, begins)
    assert goes_on["input_ids"].item() == begun[0, -1].argmax()


def test_random_samples_of_a_language_model_have_a_real_past(tmp_path):
    onnx.save(decoder_alone(), tmp_path / "model.onnx")
    file = tmp_path / "model.onnx"

    samples = open_samples(SampleSpec(count=3, flow=Flow()), input_specs(file), file)

    _, key, value = run(open_session(file), samples[3])
    np.testing.assert_array_equal(samples[0]["past_key_values.0.key"], key)
    np.testing.assert_array_equal(samples[0]["past_key_values.0.value"], value)


def test_random_images_have_the_size_of_the_folder_and_the_channels_of_the_weights(
    tmp_path,
):
    text = """(float[n, channels, height, width] pixel_values) => (float[n, 4, a, b] y)
        { s = Sub(pixel_values, half) y = Conv(s, w) }"""
    weights = {"half": np.array(0.5, np.float32), "w": np.ones((4, 3, 2, 2), np.float32)}
    onnx.save(sketch(text, weights), tmp_path / "model.onnx")
    file = tmp_path / "model.onnx"
    flow = Flow(sizes={"pixel_values": (48, 40)})

    feed = open_samples(SampleSpec(count=1, flow=flow), input_specs(file), file)[0]

    assert feed["pixel_values"].shape == (1, 3, 48, 40)


def test_a_spec_with_a_flow_survives_json():
    spec = SampleSpec("x.npz", count=3, flow=Flow(("a.onnx", "b.onnx"), 7, {"x": (1, 2)}))

    assert SampleSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
