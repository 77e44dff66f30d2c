"""Samples: every kind of source gives the feeds a model takes."""

from __future__ import annotations

import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quant_core.data import fit, npz
from quant_core.data.for_model import samples_for
from quant_core.data.input_spec import InputSpec
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError
from tests.models import sketch
from tests.samples import IMAGE, TOKENS, images, model, opened, saved, spec, zipped

IMPUTER = "ai.onnx.ml.Imputer<imputed_value_floats = [0.0]"


def test_input_specs_hold_name_dtype_and_axes(tmp_path):
    path = tmp_path / "m.onnx"
    inputs = [
        ("a", TensorProto.FLOAT, ["N", 3, None]),
        ("b", TensorProto.INT64, []),
        ("c", TensorProto.BOOL, [1, -1]),
    ]
    onnx.save(model(inputs), path)

    assert input_specs(path) == [
        spec("a", "float32", "N", 3, None),
        spec("b", "int64"),
        spec("c", "bool", 1, None),
    ]


def test_an_input_of_no_numpy_type_is_a_model_error():
    value = helper.make_tensor_value_info("s", TensorProto.BFLOAT16, [2])
    result = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])
    graph = helper.make_graph([helper.make_node("Identity", ["s"], ["y"])], "g", [value], [result])
    content = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()

    with pytest.raises(ModelError, match=r"takes tensor\(bfloat16\)"):
        input_specs(content)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 20], ids=["row by row", "in memory"])
@pytest.mark.parametrize(
    "kind",
    ["npy", "fortran", "npz", "deflate", "lzma", "array", "mapping", "feeds", "list", "folder"],
)
def test_every_kind_of_source_gives_the_same_feeds_in_any_order(
    tmp_path, monkeypatch, kind, resident_bytes
):
    monkeypatch.setattr(npz, "RESIDENT_BYTES", resident_bytes)
    data = images(5)
    match kind:
        case "npy":
            source = saved(tmp_path / "x.npy", data)
        case "fortran":
            source = saved(tmp_path / "x.npy", np.asfortranarray(data))
        case "npz":
            source = zipped(tmp_path / "x.npz", zipfile.ZIP_STORED, image=data)
        case "deflate":
            source = zipped(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=data)
        case "lzma":
            source = zipped(tmp_path / "x.npz", zipfile.ZIP_LZMA, any_name=data)
        case "array":
            source = data
        case "mapping":
            source = {"image": data}
        case "feeds":
            source = ({"image": data[i : i + 1]} for i in range(5))
        case "list":
            source = list(np.split(data, 5))
        case "folder":
            source = tmp_path / "feeds"
            source.mkdir()
            for i in range(5):
                np.savez(source / f"{i:03}.npz", image=data[i : i + 1])

    samples = opened(source, IMAGE)

    assert len(samples) == 5
    for i in (0, 1, 2, 3, 4, 2, 0):
        assert samples[i]["image"].dtype == np.float32
        np.testing.assert_array_equal(samples[i]["image"], data[i : i + 1])


def test_strings_may_be_objects_as_onnxruntime_gives_them():
    words = np.array([["one"], ["other"]])

    given = [opened({"s": x}, [spec("s", "str", "N", 1)]) for x in (words, words.astype(object))]

    assert [samples[1]["s"].tolist() for samples in given] == [[["other"]]] * 2
    with pytest.raises(DataError, match="is object"):
        opened({"s": np.array([["one"], [2]], object)}, [spec("s", "str", "N", 1)])[1]


def test_a_model_with_a_fixed_batch_gets_feeds_of_that_many_and_leaves_out_the_rest():
    samples = opened(images(7), [spec("image", "float32", 3, 1, 2, 2)], labels=np.arange(7))

    assert [feed["image"].shape for feed in samples] == [(3, 1, 2, 2)] * 2
    assert samples.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_scalars_are_fed_each_time_and_one_axis_more_means_one_feed_each():
    specs = [
        spec("x", "float32", "N", 2),
        spec("state", "float32", 2, "N", 3),
        spec("rate", "int64"),
    ]
    arrays = {"x": np.ones((4, 2)), "state": np.zeros((4, 2, 1, 3)), "rate": np.array(16000)}

    samples = opened(arrays, specs)
    one_each = opened(arrays | {"rate": np.arange(4)}, specs)

    assert {name: array.shape for name, array in samples[3].items()} == {
        "x": (1, 2),
        "state": (2, 1, 3),
        "rate": (),
    }
    assert [int(feed["rate"]) for feed in samples] == [16000] * 4
    assert [int(feed["rate"]) for feed in one_each] == [0, 1, 2, 3]


def test_a_folder_is_fed_exactly_as_stored_and_may_be_ragged(tmp_path):
    for i, (batch, length) in enumerate([(2, 5), (1, 3)]):
        np.savez(
            tmp_path / f"{i}.npz",
            ids=np.ones((batch, length), np.int16),
            lengths=np.full(batch, length),
        )
    (tmp_path / "._0.npz").write_bytes(b"left by a file manager")

    shapes = [(feed["ids"].shape, feed["lengths"].tolist()) for feed in opened(tmp_path, TOKENS)]

    assert shapes == [((2, 5), [5, 5]), ((1, 3), [3])]


def test_an_input_of_unknown_rank_is_fed_row_by_row():
    assert opened(np.zeros((3, 2, 2), np.float32), [spec("x", "float32")])[0]["x"].shape == (
        1,
        2,
        2,
    )


@pytest.mark.parametrize(
    ("stored_as", "fed_as"),
    [
        ("float64", "float32"),
        ("float32", "float16"),
        ("float16", "float32"),
        ("uint8", "float32"),
        ("int64", "float32"),
        ("int16", "int64"),
        ("int64", "int32"),
        ("uint8", "bool"),
        (">f4", "float32"),
    ],
)
def test_values_that_the_model_can_hold_are_converted(stored_as, fed_as):
    array = np.array([[0, 1], [1, 0]]).astype(stored_as)

    fed = opened(array, [spec("x", fed_as, "N", 2)])[0]["x"]

    assert fed.dtype == np.dtype(fed_as)
    assert fed.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "is_taken"),
    [
        ("m = IsNaN(x) y = Where(m, zero, x)", True),
        (f"c = Mul(x, half) y = {IMPUTER}, replaced_value_float = NaN>(c)", True),
        (f"c = {IMPUTER}>(x) y = {IMPUTER}, replaced_value_float = NaN>(c)", True),
        (f"y = {IMPUTER}, replaced_value_float = -1.0>(x)", False),
        (f"y = {IMPUTER}>(x)", False),
        ("y = Mul(x, half)", False),
    ],
)
def test_nan_is_a_missing_value_where_the_model_has_a_rule_for_it(tmp_path, text, is_taken):
    numbers = {"zero": np.array(0, np.float32), "half": np.array(0.5, np.float32)}
    path = tmp_path / "model.onnx"
    onnx.save(sketch(f"(float[n,2] x) => (float[n,2] y) {{ {text} }}", numbers), path)

    missing = samples_for(path, np.array([[1, np.nan]], np.float32))
    infinite = samples_for(path, np.array([[1, np.inf]], np.float32))

    if is_taken:
        assert np.isnan(missing[0]["x"][0, 1])
    for samples in (infinite,) if is_taken else (infinite, missing):
        with pytest.raises(DataError, match="1 NaN or infinite value"):
            samples[0]


def test_a_model_is_asked_once_for_all_samples_that_lack_values(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fit, "takes_missing", lambda _, name: asked.append(name) or True)
    path = tmp_path / "model.onnx"
    onnx.save(sketch("(float[n,2] x) => (float[n,2] y) { y = Neg(x) }", {}), path)

    samples = samples_for(path, np.full((5, 2), np.nan, np.float32))

    assert all(np.isnan(sample["x"]).all() for sample in samples)
    assert asked == ["x"]


def test_count_takes_samples_from_all_over_the_source_with_their_labels():
    labels = np.arange(10)

    samples = opened(images(10), IMAGE, count=5, labels=labels)

    assert samples.labels.tolist() == [0, 2, 4, 6, 8]
    for feed, label in zip(samples, samples.labels, strict=True):
        np.testing.assert_array_equal(feed["image"], images(10)[[label]])


def test_count_beyond_the_source_takes_it_whole():
    assert len(opened(images(3), IMAGE, count=100)) == 3


def test_shards_hold_every_feed_once_with_its_labels(tmp_path):
    for i, batch in enumerate([2, 1, 3]):
        np.savez(tmp_path / f"{i}.npz", image=np.full((batch, 1, 2, 2), i, np.float32))
    samples = opened(tmp_path, IMAGE, labels=np.array([0, 0, 1, 2, 2, 2]))

    shards = [samples.shard(k, 2) for k in range(2)]

    assert [int(feed["image"][0, 0, 0, 0]) for shard in shards for feed in shard] == [0, 2, 1]
    assert [shard.labels.tolist() for shard in shards] == [[0, 0, 2, 2, 2], [1]]
    assert len(samples.shard(5, 6)) == 0
    with pytest.raises(DataError):
        samples.shard(2, 2)


def test_the_digest_changes_with_whatever_would_be_fed_and_with_nothing_else(tmp_path):
    path, copy = saved(tmp_path / "a.npy", images(4)), saved(tmp_path / "b.npy", images(4))
    changed = images(4)
    changed[3, 0, 1, 1] += 1
    folder = tmp_path / "feeds"
    folder.mkdir()
    np.savez(folder / "0.npz", image=images(1))

    assert opened(path, IMAGE).digest() == opened(copy, IMAGE).digest()
    different = [
        opened(path, IMAGE),
        opened(path, IMAGE, count=2),
        opened(path, IMAGE).shard(0, 2).shard(0, 2),
        opened(path, IMAGE, labels=np.zeros(4, int)),
        opened(saved(tmp_path / "c.npy", changed), IMAGE),
        opened(images(4), IMAGE),
        opened(changed, IMAGE),
        opened(folder, IMAGE),
        opened("random", IMAGE, seed=0),
        opened("random", IMAGE, seed=1),
    ]
    assert len({samples.digest() for samples in different}) == len(different)


def test_samples_that_are_open_stay_as_they_are():
    samples = opened(images(4), IMAGE)

    assert open_samples(SampleSpec(samples), IMAGE) is samples


def test_samples_are_joined_to_one_feed_and_begin_again_where_they_are_few():
    samples = open_samples(
        SampleSpec({"x": np.arange(3.0)[:, None], "rate": np.array(8)}),
        [InputSpec("x", np.dtype("float32"), ("n", 1)), InputSpec("rate", np.dtype("int64"), ())],
    )

    feed = samples.batch(4)

    assert feed["x"].tolist() == [[0], [1], [2], [0]]
    assert feed["rate"] == 8


def test_feeds_are_kept_for_who_reads_them_again_as_long_as_they_are_few(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.npy", images(4))
    samples = opened(path, IMAGE)
    bytes_of_one = samples[0]["image"].nbytes
    monkeypatch.setattr("quant_core.data.samples.MAX_KEPT_BYTES", 2 * bytes_of_one)

    kept = samples.keeping()
    first = [kept[i] for i in range(4)]

    assert [kept.pick(np.array([i]))[0] is first[i] for i in range(4)] == [True, True, False, False]
    assert samples[0] is not samples[0]
