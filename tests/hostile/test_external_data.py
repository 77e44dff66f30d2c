"""A model's external data lies in the model's folder: nothing else on this host is read for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from quant_core.data.inputs import input_specs
from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.model.info import model_info
from quant_core.model.locations import model_files
from quant_core.model.normalize import load_normalized
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, optimized_graph
from tests.models import save_apart, tiny_cnn

OPENERS: list[Callable[[Path], object]] = [
    files.load,
    model_info,
    prepare,
    load_normalized,
    input_specs,
    open_session,
    optimized_graph,
]


def _link_to_file(folder: Path, secret: Path) -> str:
    (folder / "weights.bin").symlink_to(secret)
    return "weights.bin"


def _link_to_folder(folder: Path, secret: Path) -> str:
    (folder / "sub").symlink_to(secret.parent)
    return f"sub/{secret.name}"


ESCAPES: dict[str, Callable[[Path, Path], str]] = {
    "parent": lambda folder, secret: f"../{secret.name}",
    "parent of a folder": lambda folder, secret: f"here/../../{secret.name}",
    "absolute": lambda folder, secret: str(secret),
    "a link to a file": _link_to_file,
    "a link to a folder": _link_to_folder,
    "a device": lambda folder, secret: "/dev/zero",
}


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret.bin"
    path.write_bytes(bytes(100_000))
    return path


@pytest.mark.parametrize("opens", OPENERS, ids=lambda opens: opens.__name__)
@pytest.mark.parametrize("escape", ESCAPES)
def test_every_way_to_open_a_model_refuses_data_outside_its_folder(tmp_path, secret, escape, opens):
    folder = tmp_path / "model"
    folder.mkdir()
    model = tiny_cnn()
    for tensor in model.graph.initializer:
        _move_out(tensor, ESCAPES[escape](folder, secret) if tensor.name == "w" else "w.bin")
    (folder / "w.bin").write_bytes(bytes(10_000))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())

    with pytest.raises(ModelError) as raised:
        opens(path)

    assert raised.value.hint
    assert secret not in model_files(path)


def test_a_constant_node_s_tensor_is_held_to_it_too(tmp_path, secret):
    model = tiny_cnn()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "g")
    node = helper.make_node("Constant", [], ["g"], "constant", value=weight)
    _move_out(node.attribute[0].t, str(secret))
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, node)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())

    for opens in (files.load, open_session):
        with pytest.raises(ModelError):
            opens(path)


def test_data_in_a_folder_below_the_model_s_is_read_and_counts(tmp_path):
    (tmp_path / "sub").mkdir()
    model = tiny_cnn()
    save_apart(model, tmp_path / "m.onnx", "sub/w.bin")

    assert files.load(tmp_path / "m.onnx")
    assert list(model_files(tmp_path / "m.onnx")) == [
        tmp_path / "m.onnx",
        tmp_path / "sub" / "w.bin",
    ]


def _move_out(tensor: TensorProto, location: str) -> None:
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
        tensor.external_data.add(key=key, value=value)
