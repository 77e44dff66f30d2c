"""Samples: every kind of source gives the feeds a model takes; an error names its place."""

import io
import json
import pickle
import struct
import zipfile

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quant_core.data import npz
from quant_core.data.samples import InputSpec, input_specs, open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError


def spec(name, dtype, *shape):
    return InputSpec(name, np.dtype(dtype), shape)


IMAGE = [spec("image", "float32", "N", 1, 2, 2)]
TOKENS = [spec("ids", "int64", "N", "T"), spec("lengths", "int64", "N")]


def images(n, dtype=np.float32):
    return np.arange(n * 4).reshape(n, 1, 2, 2).astype(dtype)


def saved(path, array):
    np.save(path, array)
    return path


def zipped(path, method, **arrays):
    """An .npz that numpy reads but does not write: any compression, any bytes as a member."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, array in arrays.items():
            if isinstance(array, np.ndarray):
                buffer = io.BytesIO()
                np.save(buffer, array)
                array = buffer.getvalue()
            archive.writestr(f"{name}.npy", array)
    return path


def opened(source, inputs, **options):
    return open_samples(SampleSpec(source, **options), inputs)


def values(samples):
    return [{name: array.tolist() for name, array in feed.items()} for feed in samples]


# Inputs of a model


def model(inputs):
    infos = [helper.make_tensor_value_info(name, dtype, shape) for name, dtype, shape in inputs]
    outputs = [
        helper.make_tensor_value_info(f"{name}_out", dtype, None) for name, dtype, _ in inputs
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    graph = helper.make_graph(nodes, "g", infos, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


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


# Sources


@pytest.mark.parametrize("resident_bytes", [0, 1 << 20], ids=["row by row", "in memory"])
@pytest.mark.parametrize(
    "kind", ["npy", "fortran", "npz", "deflate", "lzma", "array", "mapping", "feeds", "folder"]
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


def test_memory_does_not_grow_with_a_large_file(tmp_path, monkeypatch):
    """A large .npy and a compressed member are read by the row."""
    monkeypatch.setattr(npz, "RESIDENT_BYTES", 0)
    paths = [
        saved(tmp_path / "x.npy", images(100)),
        zipped(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=images(100)),
    ]

    for path in paths:
        (array,) = npz.open_arrays(path).values()
        assert isinstance(array, npz.StoredArray)
        np.testing.assert_array_equal(array[7:9], images(100)[7:9])


# Dtypes


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
    ("array", "wanted", "problem"),
    [
        (np.array([[1.0]]), "int64", "is float64"),
        (np.array([[3_000_000_000]]), "int32", "holds 3000000000, which int32 cannot"),
        (np.array([[-1]]), "uint8", "holds -1, which uint8 cannot"),
        (np.array([[16777217]]), "float32", "holds 16777217, which float32 cannot"),
        (np.array([[2]]), "bool", "holds 2, which bool cannot"),
        (np.array([[1j]]), "float32", "is complex128"),
        (np.array([["a"]]), "float32", "is <U1"),
        (np.array([[1e39]]), "float32", "NaN or infinite as float32"),
    ],
)
def test_values_that_would_change_are_refused(array, wanted, problem):
    with pytest.raises(DataError) as caught:
        opened(array, [spec("x", wanted, "N", 1)])[0]

    assert problem in caught.value.problem
    assert caught.value.where == "array, sample 0, x"


# Random


def test_random_feeds_are_the_same_for_a_seed_and_however_they_are_split():
    specs = [
        *IMAGE,
        spec("ids", "int64", "N", "T"),
        spec("attention_mask", "int64", "N", "T"),
        spec("on", "bool"),
    ]

    whole = values(opened("random", specs, count=6, seed=3))
    parts = [values(opened("random", specs, count=6, seed=3).shard(k, 2)) for k in (0, 1)]

    assert whole[::2] == parts[0]
    assert whole[1::2] == parts[1]
    assert whole != values(opened("random", specs, count=6, seed=4))
    assert {v for feed in whole for v in feed["ids"][0]} == {0, 1}
    assert {v for feed in whole for v in feed["attention_mask"][0]} == {1}


def test_random_shapes_come_from_the_model_then_from_shape_then_from_defaults():
    image, tokens = [spec("x", "float32", None, 3, "H", "W")], spec("ids", "int64", "N", "T")
    state = spec("state", "float32", 2, "N", 8)

    assert opened("random", image)[0]["x"].shape == (1, 3, 224, 224)
    assert opened("random", image, shape=[3, 32, 64])[0]["x"].shape == (1, 3, 32, 64)
    assert opened("random", image, shape={"x": [4, 3, 32, 64]})[0]["x"].shape == (
        4,
        3,
        32,
        64,
    )
    assert opened("random", [tokens, state], shape={"ids": [1, 9]})[0]["ids"].shape == (1, 9)
    assert opened("random", [tokens, state])[0]["state"].shape == (2, 1, 8)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ({"imag": [1, 1, 2, 2]}, "no input"),
        ([1, 3, 2, 2], r"\[1, 3, 2, 2\]"),
        ([2], r"\[2\]"),
        ([1, 1, 0, 2], r"\[1, 1, 0, 2\]"),
    ],
)
def test_a_shape_that_does_not_fit_the_model_is_refused(shape, problem):
    with pytest.raises(DataError, match=problem):
        opened("random", IMAGE, shape=shape)


def test_one_shape_for_several_inputs_is_refused():
    with pytest.raises(DataError, match="2 inputs"):
        opened("random", TOKENS, shape=[1, 5])


def test_text_cannot_be_random():
    with pytest.raises(DataError, match="text"):
        opened("random", [spec("words", "str", "N")])


# Count, shards, labels, digest


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


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.zeros(4, int), "4 rows for 5 samples"),
        (np.array(1), "no axis for 5 samples"),
        (np.array(list("abcde")), "labels are <U1"),
        (np.array([0, 1, np.nan, 0, 1]), "NaN"),
    ],
)
def test_labels_that_do_not_fit_the_samples_are_refused(tmp_path, labels, problem):
    for source in (labels, saved(tmp_path / "labels.npy", labels)):
        with pytest.raises(DataError, match=problem):
            opened(images(5), IMAGE, labels=source)


def test_random_samples_have_no_labels():
    with pytest.raises(DataError, match="no right answers"):
        opened("random", IMAGE, labels=np.zeros(16, int))


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


# Bad input


@pytest.mark.parametrize(
    ("arrays", "problem", "hint"),
    [
        (
            {"ids": np.ones((2, 3)), "length": np.ones(2)},
            "'length' is no input",
            "Did you mean lengths?",
        ),
        ({"ids": np.ones((2, 3), int)}, "lacks lengths", "lengths int64[N]"),
        (
            {"ids": np.ones((2, 3), int), "lengths": np.ones(3, int)},
            "different numbers of samples: ids 2, lengths 3",
            "",
        ),
        (
            {"ids": np.ones(2, int), "lengths": np.ones(2, int)},
            "has shape (2,)",
            "Samples of ids int64[N, T]",
        ),
    ],
    ids=["misspelt", "missing", "uneven", "rank"],
)
def test_wrong_names_and_counts_are_errors_before_anything_is_read(tmp_path, arrays, problem, hint):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)

    with pytest.raises(DataError) as caught:
        opened(path, TOKENS)

    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert caught.value.where.startswith(str(path))


def test_one_array_is_not_enough_for_two_inputs(tmp_path):
    with pytest.raises(DataError, match="is one array, but the model has 2 inputs"):
        opened(saved(tmp_path / "x.npy", np.ones((2, 3), int)), TOKENS)


def test_a_sample_of_the_wrong_shape_names_both_shapes(tmp_path):
    np.savez(tmp_path / "7.npz", image=np.zeros((1, 3, 2, 2), np.float32))

    with pytest.raises(DataError, match=r"has shape \(1, 3, 2, 2\)") as caught:
        opened(tmp_path, IMAGE)[0]

    assert caught.value.where == f"{tmp_path / '7.npz'}, image"
    assert caught.value.hint == "The model takes image float32[N, 1, 2, 2]"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_named_with_its_place(bad):
    data = images(4)
    data[2, 0, 1, 0] = bad
    samples = opened(data, IMAGE)

    assert samples[1] is not None
    with pytest.raises(DataError, match=r"the first \(-?(nan|inf)\) at \(0, 0, 1, 0\)") as caught:
        samples[2]
    assert caught.value.where == "array, sample 2, image"


def test_an_empty_source_is_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    sources = [
        saved(tmp_path / "x.npy", images(0)),
        zipped(tmp_path / "x.npz", 0),
        empty,
        images(0),
        [],
        {"image": images(0)},
    ]

    for source in sources:
        with pytest.raises(DataError):
            opened(source, IMAGE)


def test_too_few_samples_for_a_fixed_batch_are_refused():
    with pytest.raises(DataError, match="too few samples"):
        opened(images(3), [spec("image", "float32", 4, 1, 2, 2)])


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype.hasobject)
    return buffer.getvalue()


def huge_header(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


BROKEN = {
    "text": b"1,2,3\n",
    "nothing": b"",
    "pickle": pickle.dumps([1, 2]),
    "objects": npy_bytes(np.array([{}, "x"], dtype=object)),
    "records": npy_bytes(np.zeros(3, [("a", "f4")])),
    "cut short": npy_bytes(images(5))[:-3],
    "header only": npy_bytes(images(5))[:30],
    "a header that promises a petabyte": huge_header((1 << 48, 1)),
    "a negative size": huge_header((-1, -4, 2, 2)),
    "more samples than a day has seconds, of nothing": huge_header((1 << 60, 0)),
    "a header of nonsense": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    "an unknown version": b"\x93NUMPY\x09\x00" + b"x" * 64,
    "half a zip": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_data_error_wherever_it_lies(tmp_path, name):
    folder = tmp_path / "feeds"
    folder.mkdir()
    (path := tmp_path / "x.npy").write_bytes(BROKEN[name])
    (folder / "0.npz").write_bytes(BROKEN[name])

    for source in (
        path,
        folder,
        zipped(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=BROKEN[name]),
    ):
        with pytest.raises(DataError) as caught:
            opened(source, IMAGE)[0]
        assert str(tmp_path) in caught.value.where
        assert caught.value.hint


def test_a_file_that_breaks_off_while_it_is_read_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "RESIDENT_BYTES", 0)
    path = saved(tmp_path / "x.npy", images(2000))
    samples = opened(path, IMAGE)
    path.write_bytes(path.read_bytes()[:-2000])

    with pytest.raises(DataError, match="cannot be read"):
        samples[1999]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        opened(tmp_path / "none.npz", IMAGE)

    assert caught.value.where == str(tmp_path / "none.npz")


def test_an_archive_that_declares_more_than_the_limits_is_not_unpacked(tmp_path, monkeypatch):
    path = zipped(
        tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=np.zeros((1000, 1, 2, 2), np.float32)
    )

    assert len(opened(path, IMAGE)) == 1000
    monkeypatch.setattr(npz, "BOMB_BYTES", 1000)
    monkeypatch.setattr(npz, "MAX_RATIO", 50)
    with pytest.raises(DataError, match="unpacks from"):
        opened(path, IMAGE)
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to"):
        opened(path, IMAGE)


def test_feeds_that_are_no_mappings_are_refused():
    with pytest.raises(DataError, match="is tuple") as caught:
        opened([(images(1), 0)], IMAGE)

    assert "input names" in caught.value.hint


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shape": [1, -1]}, r"is \[1, -1\]"),
        ({"shape": {"x": [1, -2]}}, r"is \[1, -2\]"),
    ],
)
def test_a_spec_is_valid_once_built(wrong, problem):
    with pytest.raises(DataError, match=problem):
        SampleSpec(**wrong)


def test_a_spec_survives_json():
    spec = SampleSpec("data.npz", "labels.npy", 7, {"x": [1, 3]}, 2)

    written = spec.to_dict()

    assert written == {
        "source": "data.npz",
        "labels": "labels.npy",
        "count": 7,
        "shape": {"x": [1, 3]},
        "seed": 2,
        "flow": None,
    }
    assert SampleSpec.from_dict(json.loads(json.dumps(written))) == spec


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


def test_a_fixed_batch_cannot_be_another():
    inputs = [InputSpec("x", np.dtype("float32"), (1, 2))]
    samples = open_samples(SampleSpec(np.zeros((3, 2), np.float32)), inputs)

    with pytest.raises(DataError, match="fixes it"):
        samples.batch(2)
