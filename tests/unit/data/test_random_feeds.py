"""Random samples fit their model: they index within tables, and what comes out is finite."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quant_core.data.input_spec import InputSpec
from quant_core.data.inputs import input_specs
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError
from quant_core.model.session import open_session, run
from tests.models import sketch

TABLE = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)


def drawn(path, model: onnx.ModelProto, **options) -> Samples:
    onnx.save(model, path / "model.onnx")
    file = path / "model.onnx"
    return open_samples(SampleSpec("random", **options), input_specs(file), file)


def outputs(path, samples: Samples) -> list[np.ndarray]:
    session = open_session(path / "model.onnx")
    return [output for feed in samples for output in run(session, feed)]


def named(name, dtype, *shape) -> np.ndarray:
    """The first sample of one input, by its name alone."""
    return open_samples(SampleSpec(), [InputSpec(name, np.dtype(dtype), shape)])[0][name]


def test_indices_use_all_of_their_table_and_nothing_else(tmp_path):
    text = "(int64[n, t] ids) => (float[n, t, 8] y) { u = Identity(ids) y = Gather(table, u) }"

    samples = drawn(tmp_path, sketch(text, {"table": TABLE}))

    assert set(np.concatenate([feed["ids"].ravel() for feed in samples])) == set(range(5))


def test_floats_that_become_indices_are_indices(tmp_path):
    text = "(float[n, t] ids) => (float[n, t, 8] y) { i = Cast<to = 7>(ids) y = Gather(table, i) }"

    samples = drawn(tmp_path, sketch(text, {"table": TABLE}))

    assert set(np.concatenate([feed["ids"].ravel() for feed in samples])) == set(range(5))


def test_classes_are_below_the_depth_of_their_one_hot_vectors(tmp_path):
    text = """(int64[n, t] ids) => (float[n, t, 5] y)
        { depth = Constant<value = int64 {5}>() ends = Constant<value = float[2] {0, 1}>()
          y = OneHot(ids, depth, ends) }"""

    samples = drawn(tmp_path, sketch(text))

    assert set(np.concatenate([feed["ids"].ravel() for feed in samples])) == set(range(5))


def test_indices_are_known_behind_arithmetic_and_are_no_lengths(tmp_path):
    """Frameworks add the size of the table to negative indices."""
    text = """(int64[n, t] ids, int64[n, t] most) => (float[n, t, 8] y)
        { low = Less(ids, most) c = Cast<to = 7>(low) s = Mul(c, zero) i = Add(ids, s)
          y = Gather(table, i) }"""

    samples = drawn(tmp_path, sketch(text, {"table": TABLE, "zero": np.array(0)}))

    assert set(np.concatenate([feed["ids"].ravel() for feed in samples])) == set(range(5))


def test_padding_is_left_out_where_it_breaks_the_model(tmp_path):
    """1 / 0 where an id is 0."""
    text = """(int64[n, t] ids) => (float[n, t, 8] y)
        { e = Gather(table, ids) f = Cast<to = 1>(ids) g = Unsqueeze(f, last) y = Div(e, g) }"""

    samples = drawn(tmp_path, sketch(text, {"table": TABLE, "last": np.array([-1])}))

    assert set(np.concatenate([feed["ids"].ravel() for feed in samples])) == {1, 2, 3, 4}


def test_the_smallest_table_bounds_an_input_that_indexes_two(tmp_path):
    text = """(int64[n, t] ids) => (float[n, t, 8] y)
        { a = Gather(table, ids) b = Gather(small, ids) y = Add(a, b) }"""

    samples = drawn(tmp_path, sketch(text, {"table": TABLE, "small": TABLE[:3]}))

    assert max(feed["ids"].max() for feed in samples) == 2


@pytest.mark.parametrize("seed", range(8))
def test_columns_that_index_parts_of_one_table_are_drawn_so_that_all_samples_run(tmp_path, seed):
    """One draw in five fits by luck: then the next ones do not."""
    text = "(int64[n, 2] ids) => (float[n, 2, 8] y) { i = Add(ids, starts) y = Gather(table, i) }"
    constants = {"table": TABLE, "starts": np.array([0, 4])}

    samples = drawn(tmp_path, sketch(text, constants), seed=seed, count=32)

    assert len(outputs(tmp_path, samples)) == 32


def test_a_table_that_is_an_input_bounds_its_indices(tmp_path):
    text = (
        "(float[num_atoms, 8] atoms, int64[edges] to) => (float[m, 8] y) { y = Gather(atoms, to) }"
    )

    samples = drawn(tmp_path, sketch(text))

    assert samples[0]["atoms"].shape == (32, 8)
    assert max(feed["to"].max() for feed in samples) > 1
    assert outputs(tmp_path, samples)


def test_lengths_count_the_steps_of_the_other_input(tmp_path):
    text = """(float[n, t, 4] x, int64[n] lengths) => (float[n, 4] y)
        { s = ReduceSum<keepdims = 0>(x, axis) f = Cast<to = 1>(lengths) g = Unsqueeze(f, axis)
          y = Div(s, g) }"""

    samples = drawn(tmp_path, sketch(text, {"axis": np.array([1])}))

    assert samples[0]["lengths"].tolist() == [32]
    assert all(np.isfinite(output).all() for output in outputs(tmp_path, samples))


@pytest.mark.parametrize("kind", ["float", "int64"])
def test_the_sides_that_a_mask_is_resized_to_are_those_of_the_image(tmp_path, kind):
    text = f"""({kind}[2] hw, float[n, 3, h, w] image) => (float[n, 3, height, width] y)
        {{ half = Constant<value = float {{0.5}}>() batch = Constant<value = int64[2] {{1, 3}}>()
          f = Cast<to = 1>(hw) m = Mul(f, half) r = Round(m) i = Cast<to = 7>(r)
          s = Concat<axis = 0>(batch, i) y = Resize<mode = "linear">(image, "", "", s) }}"""

    samples = drawn(tmp_path, sketch(text), shape={"image": [3, 96, 96]})

    assert samples[0]["hw"].tolist() == [96, 96]
    assert outputs(tmp_path, samples)[0].shape == (1, 3, 48, 48)


def test_the_lengths_of_a_recurrent_network_are_known_by_their_place(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, 4, 3)).astype(np.float32),
        "r": rng.normal(size=(1, 4, 4)).astype(np.float32),
    }
    text = """(float[t, 1, 3] x, int32[1] many) => (float[t, 1, 1, 4] y)
        { y = RNN<hidden_size = 4>(x, w, r, , many) }"""

    samples = drawn(tmp_path, sketch(text, weights))

    assert samples[0]["many"].tolist() == [samples[0]["x"].shape[0]]


def test_lengths_that_are_constant_tell_the_sizes_of_what_is_reversed(tmp_path):
    text = """(float[t, n, 4] x) => (float[t, n, 4] y)
        { y = ReverseSequence<batch_axis = 1, time_axis = 0>(x, many) }"""

    samples = drawn(tmp_path, sketch(text, {"many": np.array([7, 5])}))

    assert samples[0]["x"].shape == (7, 2, 4)
    assert outputs(tmp_path, samples)


@pytest.mark.parametrize(
    ("reads", "weight", "axes"),
    [("MatMul(u, w)", (8, 4), 2), ("Conv(u, w)", (4, 3, 5, 5), 4), ("Conv(u, w)", (4, 3, 5), 3)],
)
def test_an_input_without_a_shape_has_the_axes_of_what_reads_it(tmp_path, reads, weight, axes):
    text = f"(float[n] x) => (float[n] y) {{ u = Identity(x) y = {reads} }}"
    model = sketch(text, {"w": np.ones(weight, np.float32)})
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")

    samples = drawn(tmp_path, model)

    assert samples[0]["x"].ndim == axes
    assert outputs(tmp_path, samples)


def test_attention_covers_all_steps_of_a_packed_prompt(tmp_path):
    text = """(float[1, 5, 64] x, int32[1] last, int32 all) => (float[1, 5, 32] y)
        { y, k, v = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 1>
            (x, , , , , last, all) }"""

    samples = drawn(tmp_path, sketch(text))

    assert {int(feed["all"]) for feed in samples} == {5}
    assert all(np.isfinite(output).all() for output in outputs(tmp_path, samples))


def test_a_loop_that_an_input_counts_repeats_what_it_does(tmp_path):
    text = """(float[n, 4] x, int64 k) => (float[n, 4] y) {
        y = Loop(k, yes, x) <body = b (int64 i, bool c, float[n, 4] s) => (bool d, float[n, 4] t)
            { d = Identity(c) t = Tanh(s) }> }"""

    samples = drawn(tmp_path, sketch(text, {"yes": np.array(True)}))

    assert {int(feed["k"]) for feed in samples} > {1, 2, 3}


@pytest.mark.parametrize(
    ("hidden", "expected"), [("sub = Sub(one, mask)", 1), ("sub = Identity(mask)", 0)]
)
def test_a_mask_shows_everything_whichever_way_it_means_that(tmp_path, hidden, expected):
    """Masked altogether, the Softmax is NaN."""
    text = f"""(float[n, t] x, float[n, t] mask) => (float[n, t] y)
        {{ {hidden} is = Greater(sub, half) shifted = Sub(x, inf) p = Where(is, shifted, x)
           y = Softmax(p) }}"""
    numbers = {"one": 1.0, "half": 0.5, "inf": np.inf}

    samples = drawn(
        tmp_path, sketch(text, {k: np.array(v, np.float32) for k, v in numbers.items()})
    )

    assert samples[0]["mask"].min() == samples[0]["mask"].max() == expected
    assert all(np.isfinite(output).all() for output in outputs(tmp_path, samples))


def test_axes_that_belong_together_have_sizes_that_fit(tmp_path):
    """A decoder with past keys: the mask covers the past and what is new."""
    text = """(int64[n, seq] ids, float[n, past, 8] past_k, float[n, "past + seq", 8] all)
        => (float[n, m, 8] y)
        { e = Gather(table, ids) k = Concat<axis = 1>(past_k, e) y = Add(k, all) }"""
    model = sketch(text.replace('"past + seq"', "total"), {"table": TABLE})
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "past + seq"

    feed = drawn(tmp_path, model)[0]

    assert feed["all"].shape[1] == feed["past_k"].shape[1] + feed["ids"].shape[1]


def test_an_axis_that_only_a_mask_has_covers_the_past_and_what_is_new(tmp_path):
    text = """(int64[b, t] ids, int64[b, m] attention_mask, float[b, 2, p, 8] past_0)
        => (float[b, 2, u, 8] y)
        { e = Gather(table, ids) n = Unsqueeze(e, one) r = Concat<axis = 1>(n, n)
          k = Concat<axis = 2>(past_0, r) c = Cast<to = 1>(attention_mask)
          d = Unsqueeze(c, axes) y = Mul(k, d) }"""
    constants = {"table": TABLE, "one": np.int64([1]), "axes": np.int64([1, 3])}

    feed = drawn(tmp_path, sketch(text, constants))[0]

    assert feed["attention_mask"].shape[1] == feed["past_0"].shape[2] + feed["ids"].shape[1]


@pytest.mark.parametrize("name", ["width", "DynamicDimension.", "?"])
def test_open_sides_of_an_image_are_sides_whatever_their_names(name):
    image = named("x", np.float32, "n", 3, f"{name}1", f"{name}2")

    assert image.shape == (1, 3, 224, 224)


@pytest.mark.parametrize("shape", [("n", 4, "height", "width"), ("n", "height", "width", 16)])
def test_open_sides_of_a_latent_image_are_shorter_as_attention_is_between_all_its_pixels(shape):
    latent = named("sample", np.float32, *shape)

    assert sorted(latent.shape)[2:] == [64, 64]


def test_what_shares_the_sides_of_features_has_them_short_too():
    score = InputSpec("score", np.dtype(np.float32), (1, 2, "h", "w"))
    features = InputSpec("features", np.dtype(np.float32), (1, 32, "h", "w"))

    feed = open_samples(SampleSpec(), [score, features])[0]

    assert {name: array.shape for name, array in feed.items()} == {
        "score": (1, 2, 64, 64),
        "features": (1, 32, 64, 64),
    }


def test_the_timestep_of_a_diffusion_model_is_one_for_the_whole_batch():
    assert named("timestep", np.int64, "steps").shape == (1,)
    assert named("timesteps", np.float32, "num_steps").shape == (1,)


def test_open_axes_that_count_points_are_no_sides():
    points = named("points", np.float32, "n", "point_batch_size", "points_per_image", 2)

    assert points.shape == (1, 1, 32, 2)


@pytest.mark.parametrize(("side", "words"), [(48 * 7, 32), (32, 32), (768, 16)])
def test_sides_are_tried_until_an_image_has_the_patches_that_the_model_has_places_for(
    tmp_path, side, words
):
    places = np.ones((1, 8, (side // 16) ** 2), np.float32)
    text = """(float[n, 3, h, w] x, int64[n, t] ids) => (float[n, 8, p] y) {
        a = Conv<strides = [16, 16]>(x, k) b = Reshape(a, flat) c = Add(b, places)
        g = Gather(table, ids) r = Add(g, order)
        m = ReduceMean<axes = [1, 2], keepdims = 1>(r) y = Add(c, m) }"""
    weights = {
        "order": np.ones((words, 4), np.float32),
        "k": np.ones((8, 3, 16, 16), np.float32),
        "flat": np.array([0, 8, -1]),
        "places": places,
        "table": np.ones((100, 4), np.float32),
    }

    samples = drawn(tmp_path, sketch(text, weights))

    assert samples[0]["x"].shape == (1, 3, side, side)
    assert outputs(tmp_path, samples)


def test_other_sizes_are_tried_until_the_model_runs(tmp_path):
    kernel = np.ones((2, 1, 400), np.float32)
    text = "(float[n, 1, t] x) => (float[n, 2, m] y) { y = Conv<strides = [160]>(x, w) }"

    samples = drawn(tmp_path, sketch(text, {"w": kernel}))

    assert samples[0]["x"].shape[2] >= 400


@pytest.mark.parametrize(
    "body",
    [
        "a = Reshape(x, shape) y = Transpose<perm = [1, 0, 2]>(a)",
        "two = Constant<value = int64[1] {2}>() four = Constant<value = int64[1] {4}>() "
        "sizes = Concat<axis = 0>(length, two, four) y = Reshape(x, sizes)",
        "r = Relu(x) e = Exp(r) y = Add(e, table)",
        "y = com.microsoft.RotaryEmbedding<num_heads = 2>(x, steps, angles, angles)",
    ],
    ids=["a shape", "part of a shape", "a table", "positions"],
)
def test_a_size_that_the_exporter_wrote_into_a_constant_is_tried(tmp_path, body):
    text = f"(float[1, t, 8] x) => (float[a, b, c] y) {{ {body} }}"
    constants = {
        "shape": np.array([41, 2, 4]),
        "length": np.array([41]),
        "table": np.ones((1, 41, 8), np.float32),
        "steps": np.arange(41).reshape(1, 41),
        "angles": np.ones((64, 2), np.float32),
    }

    samples = drawn(tmp_path, sketch(text, constants))

    assert samples[0]["x"].shape == (1, 41, 8)
    assert outputs(tmp_path, samples)


def test_a_batch_that_the_model_divides_is_drawn(tmp_path):
    """Such a model takes each row in four forms, and gives their mean."""
    text = """(float[n, 5] x, float[m, 5] z) => (float[a, 5] y)
        { s = Add(x, z) forms = Reshape(s, sizes) y = ReduceMean<axes = [0]>(forms) }"""

    samples = drawn(tmp_path, sketch(text, {"sizes": np.array([4, -1, 5])}))

    assert samples[0]["x"].shape == samples[0]["z"].shape == (4, 5)
    assert outputs(tmp_path, samples)


def test_open_axes_of_a_state_are_the_batch(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(1, 4, 3)).astype(np.float32),
        "r": rng.normal(size=(1, 4, 4)).astype(np.float32),
    }
    text = """(float[t, n, 3] x, float[1, m, 4] state) => (float[t, 1, n, 4] y)
        { y = RNN<hidden_size = 4>(x, w, r, , , state) }"""
    model = sketch(text, weights)
    for axis, value in ((1, model.graph.input[0]), (1, model.graph.input[1])):
        value.type.tensor_type.shape.dim[axis].ClearField("dim_param")

    samples = drawn(tmp_path, model)

    assert outputs(tmp_path, samples)


def test_a_model_that_no_sample_fits_is_an_error_that_says_why(tmp_path):
    text = (
        "(float[n, t] x) => (float[n, 2] y) { a = MatMul(x, w3) b = MatMul(x, w5) y = Add(a, b) }"
    )
    weights = {f"w{k}": np.ones((k, 2), np.float32) for k in (3, 5)}

    with pytest.raises(DataError, match="no random sample fits"):
        drawn(tmp_path, sketch(text, weights))


def test_texts_come_from_the_table_that_looks_them_up(tmp_path):
    model = sketch("(int64[n] i) => (float[n, 8] y) { y = Gather(table, i) }", {"table": TABLE})
    keys = [b"red", b"green"]
    node = helper.make_node(
        "LabelEncoder",
        ["colour"],
        ["i"],
        domain="ai.onnx.ml",
        keys_strings=keys,
        values_int64s=[0, 4],
    )
    model.graph.node.insert(0, node)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("colour", TensorProto.STRING, ["n"])
    )

    samples = drawn(tmp_path, model, count=20)

    assert {str(text) for feed in samples for text in feed["colour"]} == {"red", "green"}


def test_texts_whose_case_is_changed_come_from_the_vocabulary_that_counts_them(tmp_path):
    text = """(string[n] words) => (float[m] y) {
        w = StringNormalizer<case_change_action = "LOWER", locale = "C">(words)
        y = TfIdfVectorizer<max_gram_length = 1, max_skip_count = 0, min_gram_length = 1,
            mode = "TF", ngram_counts = [0], ngram_indexes = [0, 1],
            pool_strings = ["red", "green"]>(w) }"""

    samples = drawn(tmp_path, sketch(text), count=20)

    assert {str(text) for feed in samples for text in feed["words"]} == {"red", "green"}


SPLITS = {
    "StringSplit": 's, c = StringSplit <delimiter = " "> (words)',
    "Tokenizer": """s = com.microsoft.Tokenizer <mark = 0, mincharnum = 1, pad_value = "#",
        tokenexp = "[a-z]+"> (words)""",
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=list(SPLITS))
def test_texts_that_are_split_come_from_the_vocabulary_that_counts_their_words(tmp_path, split):
    text = f"""<ir_version: 9, opset_import: ["" : 20, "com.microsoft" : 1]>
        agraph (string[n] words) => (float[n, 2] y) {{
        {split}
        y = TfIdfVectorizer<max_gram_length = 1, max_skip_count = 0, min_gram_length = 1,
            mode = "TF", ngram_counts = [0], ngram_indexes = [0, 1],
            pool_strings = ["red", "green"]>(s) }}"""

    samples = drawn(tmp_path, onnx.parser.parse_model(text), count=20)

    assert {str(text) for feed in samples for text in feed["words"]} == {"red", "green"}


def test_pixels_that_the_model_divides_by_255_are_pixels(tmp_path):
    text = "(float[n, 3, 32, 32] x) => (float[n, 3, 32, 32] y) { y = Div(x, top) }"

    samples = drawn(tmp_path, sketch(text, {"top": np.array(255, np.float32)}))

    assert 200 < samples[0]["x"].max() <= 255
    assert samples[0]["x"].min() >= 0


SQUARES = [
    "p = Mul(c, c)",
    "p = Pow(c, two)",
    "e = Constant <value = float {2.0}> () p = Pow(c, e)",
]


PIXELS = "(float[n, 3, 32, 32] x) => (float[n, 8, h, k] y)"
CONV = "y = Conv(x, w, b)"
BATCH_NORM = "a = Conv(x, w) y = BatchNormalization(a, one, b, zero, variance)"


@pytest.mark.parametrize(
    ("body", "size", "top"), [(CONV, 100, 255), (CONV, 1, None), (BATCH_NORM, 100, 255)]
)
def test_a_first_conv_with_weights_small_beside_its_biases_takes_pixels(tmp_path, body, size, top):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((8, 3, 3, 3)).astype(np.float32)
    norm = np.linalg.norm(kernel.reshape(8, -1), axis=1).mean()
    of_conv = 1.0 if body == BATCH_NORM else norm * size
    weights = {
        "w": kernel / np.float32(of_conv),
        "b": np.ones(8, np.float32),
        "one": np.ones(8, np.float32),
        "zero": np.zeros(8, np.float32),
        "variance": np.full(8, (norm * size) ** 2, np.float32),
    }

    samples = drawn(tmp_path, sketch(f"{PIXELS} {{ {body} }}", weights))

    largest = max(feed["x"].max() for feed in samples)
    assert largest > 200 if top else largest < 20


@pytest.mark.parametrize(
    ("shape", "is_audio"),
    [((1, None), True), ((1, 1, None), True), ((1, None, 2), True), ((1, None, 400), False)],
)
def test_what_is_called_speech_but_has_many_channels_is_its_features(shape, is_audio):
    sound = named("speech", "float32", *shape)

    assert (np.abs(sound).max() <= 1) == is_audio


@pytest.mark.parametrize("square", SQUARES)
def test_what_becomes_the_logarithm_of_a_spectrum_is_a_sound(tmp_path, square):
    """In noise all bins are alike: it would not tell that 8 bits are too few for a spectrum."""
    text = f"""(float[n, 512] x) => (float[n, 4] y)
        {{ c = MatMul(x, waves) {square} m = MatMul(p, bank) y = Log(m) }}"""
    arrays = {"waves": np.ones((512, 64), np.float32), "bank": np.ones((64, 4), np.float32)}

    samples = drawn(tmp_path, sketch(text, arrays | {"two": np.float32([2])}))

    assert 0.01 < np.abs(samples[0]["x"]).max() <= 1


@pytest.mark.parametrize(
    ("shape", "body", "is_sound"),
    [
        ("n, 512", "{ c = MatMul(x, waves) a, b = Split<axis = 1>(c) BOTH y = Sqrt(s) }", True),
        ("n, 512", "{ c = MatMul(x, waves) a, b = Split<axis = 1>(c) BOTH y = Pow(s, p) }", True),
        ("n, 512", "{ c = STFT(x, hop, window) y = Neg(c) }", True),
        ("n, 1, 512", "{ c = Conv(x, filters) y = Abs(c) }", True),
        # short filters are for any series, the length of a vector is no spectrum, squares of
        # coordinates give a distance, and the gradient of an image is no sound
        ("n, 1, 512", "{ c = Conv(x, short) y = Abs(c) }", False),
        ("n, 512", "{ a = MatMul(x, waves) aa = Mul(a, a) s = ReduceSum(aa) y = Sqrt(s) }", False),
        ("n, 512", "{ a, b = Split<axis = 1>(x) BOTH y = Sqrt(s) }", False),
        ("n, 1, 8, 8", "{ a = Conv(x, dx) b = Conv(x, dx) BOTH y = Sqrt(s) }", False),
    ],
)
def test_what_becomes_a_spectrum_is_a_sound(tmp_path, shape, body, is_sound):
    squares = "aa = Mul(a, a) bb = Pow(b, two) s = Add(aa, bb)"
    text = f"(float[{shape}] x) => (float y) {body.replace('BOTH', squares)}"
    arrays = {
        "waves": np.ones((512, 64), np.float32),
        "filters": np.ones((4, 1, 64), np.float32),
        "short": np.ones((4, 1, 16), np.float32),
        "dx": np.float32([[[[-1, 1]]]]),
        "two": np.float32(2),
        "p": np.float32(0.3),
        "window": np.ones(128, np.float32),
        "hop": np.int64(64),
    }

    sound = drawn(tmp_path, sketch(text, arrays))[0]["x"]

    assert (0.01 < np.abs(sound).max() <= 1) == is_sound


def test_what_a_logarithm_takes_directly_is_positive(tmp_path):
    text = "(float[n, 64] x) => (float[n, 64] y) { m = MatMul(x, bank) y = Log(m) }"

    samples = drawn(tmp_path, sketch(text, {"bank": np.eye(64, dtype=np.float32)}))

    assert samples[0]["x"].min() >= 0


def test_names_say_what_no_graph_says():
    audio = named("waveform", "float32", "N", "T")

    assert audio.shape == (1, 16000)
    assert np.abs(audio).max() <= 1
    assert named("sr", "int64") == 16000
    assert named("fmin", "float32") < named("fmax", "float32")
    assert named("attention_mask", "int64", "N", "T").all()
    assert 0.5 <= named("length_scale", "float32", 1) <= 1
    assert named("use_cache_branch", "bool", 1).dtype == bool


def test_sizes_that_weights_fix_are_not_drawn(tmp_path):
    text = """(float[n, steps, features] x) => (float[n, o, 4] y)
        { t = Transpose<perm = [0, 2, 1]>(x) c = Conv(t, w) u = Transpose<perm = [0, 2, 1]>(c)
          y = MatMul(u, m) }"""
    weights = {"w": np.ones((6, 5, 3), np.float32), "m": np.ones((6, 4), np.float32)}

    samples = drawn(tmp_path, sketch(text, weights))

    assert samples[0]["x"].shape == (1, 32, 5)


@pytest.mark.parametrize("pads", ["computed", "constant"])
def test_channels_are_known_behind_a_pad_of_the_sides(tmp_path, pads):
    text = f"""(float[n, c, h, w] x) => (float[n, o, height, width] y)
        {{ s = Shape(x) sides = Slice(s, two, four) m = Mod(sides, four)
          computed = Concat<axis = 0>(none, none, none, m)
          p = Pad(x, {pads}) d = Sub(p, mean) y = Conv(d, weight) }}"""
    constants = {
        "two": np.array([2]),
        "four": np.array([4]),
        "none": np.array([0, 0]),
        "constant": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "mean": np.zeros((1, 3, 1, 1), np.float32),
        "weight": np.ones((4, 3, 3, 3), np.float32),
    }

    samples = drawn(tmp_path, sketch(text, constants))

    assert samples[0]["x"].shape == (1, 3, 224, 224)


def test_an_axis_of_size_zero_stays_empty_as_that_of_the_past_of_a_first_step(tmp_path):
    text = """(float[n, 8] x, float[1, 4, 0, 8] past, float[0, 8] rows, int64[1, 0] mask)
        => (float[a, 8] y, float[1, 4, b, 8] z)
        { y = Concat<axis = 0>(rows, x) z = Concat<axis = 2>(past, ones) }"""

    samples = drawn(tmp_path, sketch(text, {"ones": np.ones((1, 4, 2, 8), np.float32)}), count=3)

    assert len(samples) == 3
    assert {name: array.shape for name, array in samples[0].items()} == {
        "x": (1, 8),
        "past": (1, 4, 0, 8),
        "rows": (0, 8),
        "mask": (1, 0),
    }
    assert outputs(tmp_path, samples)[1].shape == (1, 4, 2, 8)


def test_constants_that_are_added_and_axes_that_are_moved_fix_sizes(tmp_path):
    text = """(float[n, bands, c] x) => (float[n, 3, 7] y)
        { a = Add(x, table) t = Transpose<perm = [0, 2, 1]>(a) u = Unsqueeze(t, first)
          s = Squeeze(u, first) y = MatMul(s, w) }"""
    arrays = {"table": np.ones((9, 3), np.float32), "w": np.ones((9, 7), np.float32)}

    samples = drawn(tmp_path, sketch(text, arrays | {"first": np.array([0])}))

    assert samples[0]["x"].shape == (1, 9, 3)


@pytest.mark.parametrize("operator", ["Conv", "MaxPool<kernel_shape = [3, 3]>", "RNN"])
def test_a_first_axis_that_windows_move_along_is_no_batch(tmp_path, operator):
    """Such a spectrum gets its batch and its channel in the model."""
    body = {"RNN": "u = Unsqueeze(x, one) y = RNN<hidden_size = 4>(u, wi, wr)"}.get(
        operator,
        f"u = Unsqueeze(x, two) y = {operator}(u{', k' if operator == 'Conv' else ''})",
    )
    arrays = {
        "one": np.array([1]),
        "two": np.array([0, 1]),
        "k": np.ones((2, 1, 3, 3), np.float32),
        "wi": np.ones((1, 4, 6), np.float32),
        "wr": np.ones((1, 4, 4), np.float32),
    }

    samples = drawn(tmp_path, sketch(f"(float[a, 6] x) => (float y) {{ {body} }}", arrays))

    assert samples[0]["x"].shape == (32, 6)


def test_draws_on_which_the_model_fails_are_left_out(tmp_path):
    """There is no row 9: one of the branches never runs."""
    text = """(float[n, 3] x, bool p) => (float[n, 3] y)
        { y = If(p) < then_branch = g1 () => (float[n, 3] u) { u = Relu(x) },
                      else_branch = g2 () => (float[n, 3] v) { v = Gather(x, row) } > }"""

    samples = drawn(tmp_path, sketch(text, {"row": np.array([9])}), count=6)

    assert [bool(feed["p"]) for feed in samples] == [True] * 6
    assert len({feed["x"].tobytes() for feed in samples}) == 6
    outputs(tmp_path, samples)


def test_draws_that_are_not_finite_are_left_out(tmp_path):
    text = """(int64[n] i) => (float[n] y) { g = Gather(table, i) y = Log(g) }"""
    table = np.array([0, 1, 2, 3], np.float32)

    samples = drawn(tmp_path, sketch(text, {"table": table}), count=4)

    assert all(np.isfinite(output).all() for output in outputs(tmp_path, samples))
    assert {int(i) for feed in samples for i in feed["i"]} <= {1, 2, 3}
