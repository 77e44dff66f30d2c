"""A folder of Hugging Face becomes jobs: its graphs, what flows between them, what is copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.batch.copies import copy_files
from flows.batch.digests import job_digest, url_contents
from flows.manifest.jobs import Manifest
from flows.manifest.read import check_manifest
from quant_core.data.spec import Flow
from quant_core.errors import RequestError
from tasks import stores
from tasks.locations import Url
from tests.folders import NAMES, START, save_folder
from tests.jobs import after_json

ENCODER, DECODER, WITH_PAST, MERGED = NAMES


@pytest.fixture
def folder(tmp_path) -> Path:
    save_folder(tmp_path / "model")
    return tmp_path


def manifest(folder: Path, **options) -> Manifest:
    batch = {"input_dir": "model", "output_dir": "out", "layout": "huggingface"}
    return check_manifest({**options, "batch": {**batch, **options.pop("batch", {})}}, folder)


def test_outputs_have_the_names_that_are_looked_for(folder):
    by_bits = {bits: manifest(folder, bits=bits) for bits in (8, 4)}

    for bits, suffix in ((8, "int8"), (4, "q4")):
        outputs = [job.output for job in by_bits[bits].jobs]
        assert outputs == [folder / f"out/onnx/{name}_{suffix}.onnx" for name in NAMES]
    names = {target.name for source, target in by_bits[8].copies if source.suffix == ".onnx"}
    assert names == {f"{name}_quantized.onnx" for name in NAMES}


def test_graphs_at_the_top_are_written_into_onnx_and_those_of_other_folders_stay_there(folder):
    (folder / "model/onnx/encoder_model.onnx").rename(folder / "model/encoder_model.onnx")
    (folder / "model/vae").mkdir()
    (folder / "model/onnx/decoder_model.onnx").rename(folder / "model/vae/model.onnx")

    outputs = {job.name: job.output for job in manifest(folder).jobs}

    assert outputs["encoder_model"] == folder / "out/onnx/encoder_model_int8.onnx"
    assert outputs["model"] == folder / "out/vae/model_int8.onnx"


def test_each_graph_has_those_before_that_may_flow_into_it(folder):
    jobs = {job.name: job for job in manifest(folder).jobs}

    flows = {name: job.calibration.flow for name, job in jobs.items()}
    onnx = folder / "model/onnx"
    encoder, decoder = (str(onnx / f"{name}.onnx") for name in (ENCODER, DECODER))
    assert flows[ENCODER] == Flow((), START)
    assert flows[DECODER] == flows[MERGED] == Flow((encoder,), START)
    assert flows[WITH_PAST] == Flow((encoder, decoder), START)


def test_config_and_tokenizer_are_copied_but_no_graph_variant_or_weights(tmp_path):
    save_folder(tmp_path / "model", data="weights.bin")
    (tmp_path / "model/onnx/encoder_model_fp16.onnx").write_bytes(b"half")
    (tmp_path / "model/onnx/encoder_model_fp16.onnx_data").write_bytes(b"halves")
    (tmp_path / "model/model-00001-of-00002.safetensors").write_bytes(b"of torch")
    (tmp_path / "model/model.safetensors.index.json").write_bytes(b"{}")
    (tmp_path / "model/.git").mkdir()
    (tmp_path / "model/.git/config").write_text("")

    found = manifest(tmp_path)

    assert [job.name for job in found.jobs] == list(NAMES)
    copied = {str(t.relative_to(tmp_path / "out")) for s, t in found.copies if s.suffix != ".onnx"}
    assert copied == {"config.json", "tokenizer.json"}


def test_a_folder_in_a_store_is_the_same_as_a_local_one(tmp_path):
    save_folder(tmp_path / "model", data="weights.bin")
    (tmp_path / "model/onnx/encoder_model_fp16.onnx").write_bytes(b"half")
    store = Url(f"memory://{tmp_path.name}/bucket")
    for path in (tmp_path / "model").rglob("*.*"):
        stores.upload(path, store / path.relative_to(tmp_path), 60.0)

    local = manifest(tmp_path)
    found = manifest(tmp_path, batch={"input_dir": f"{store}/model", "output_dir": f"{store}/out"})

    assert found.jobs == after_json(local.jobs, (str(tmp_path), str(store)))
    copies = [[str(path).replace(str(tmp_path), str(store)) for path in c] for c in local.copies]
    assert copies == [[str(path) for path in copy] for copy in found.copies]
    assert job_digest(found.jobs[1]) == job_digest(local.jobs[1])
    encoder, decoder = (f"{store}/model/onnx/{name}.onnx" for name in (ENCODER, DECODER))
    assert list(url_contents(found.jobs[1])) == [decoder, encoder]
    copy_files(copy for copy in found.copies if copy[0].suffix == ".json")
    assert stores.read(store / "out/config.json") == (tmp_path / "model/config.json").read_bytes()


def test_a_variant_without_its_original_is_a_graph(tmp_path):
    save_folder(tmp_path / "model", names=[ENCODER])
    path = tmp_path / "model/onnx/encoder_model.onnx"
    path.rename(path.with_name("encoder_model_fp16.onnx"))

    assert [job.input.name for job in manifest(tmp_path).jobs] == ["encoder_model_fp16.onnx"]


@pytest.mark.parametrize(
    ("configs", "start"),
    [
        ({"config.json": {"bos_token_id": 1, "decoder": {"decoder_start_token_id": 2}}}, 2),
        ({"config.json": {"decoder_start_token_id": 2}, "generation_config.json": {}}, 2),
        ({"generation_config.json": {"decoder_start_token_id": 5}, "config.json": []}, 5),
        ({"config.json": {"decoder_start_token_id": True}}, None),
        ({}, None),
    ],
)
def test_the_first_token_is_read_from_the_configs(folder, configs, start):
    (folder / "model/config.json").unlink()
    for name, values in configs.items():
        (folder / "model" / name).write_text(json.dumps(values))

    assert manifest(folder).jobs[0].calibration.flow.start == start


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"size": {"height": 384, "width": 128}}, {"pixel_values": (384, 128)}),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, {"pixel_values": (224, 224)}),
        ({"feature_size": 80, "nb_max_frames": 3000}, {"input_features": (80, 3000)}),
        ({"size": {"longest_edge": -1}, "feature_size": "80", "nb_max_frames": 1 << 40}, {}),
    ],
)
def test_sizes_of_random_samples_are_those_of_the_preprocessor(folder, config, sizes):
    (folder / "model/preprocessor_config.json").write_text(json.dumps(config))

    assert manifest(folder).jobs[0].calibration.flow.sizes == sizes


def test_originals_in_the_folder_itself_are_never_replaced(folder):
    (folder / "model/onnx/encoder_model_quantized.onnx").write_bytes(b"of somebody else")

    with pytest.raises(RequestError, match=r"encoder_model_quantized\.onnx already"):
        manifest(folder, batch={"output_dir": "model"})


def test_a_layout_needs_a_folder_with_graphs(folder):
    (folder / "empty").mkdir()

    for place, problem in (("nothing", "is no folder"), ("empty", "no .onnx file")):
        with pytest.raises(RequestError, match=problem):
            manifest(folder, batch={"input_dir": place})
    with pytest.raises(RequestError, match=r"batch\.layout"):
        manifest(folder, batch={"layout": "keras"})


def test_graphs_that_share_a_file_of_weights_are_rounded_alike_and_share_one_again(tmp_path):
    save_folder(tmp_path / "model", data="weights.onnx_data")

    jobs, chosen = manifest(tmp_path).jobs, manifest(tmp_path, weight_method="gptq").jobs

    assert {job.data for job in (*jobs, *chosen)} == {"weights_int8.onnx_data"}
    assert {job.config.weight_method for job in jobs} == {"mse"}
    assert {job.config.weight_method for job in chosen} == {"gptq"}


def test_graphs_that_hold_their_weights_themselves_share_none(folder):
    jobs = manifest(folder).jobs

    assert {(job.data, job.config.weight_method) for job in jobs} == {(None, "auto")}


def test_a_manifest_with_a_layout_survives_json(folder):
    found = manifest(folder, calibration={"num_samples": 3}, evaluation={"data": "random"})

    assert after_json(found.jobs) == found.jobs
