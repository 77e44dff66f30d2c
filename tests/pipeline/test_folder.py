"""A folder of Hugging Face is one job: its graphs still work together when they are quantized."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from flows.manifest.read import check_manifest
from quant_core.config import FLOOR_DB
from quant_core.data.inputs import input_specs
from quant_core.model.session import open_session, run
from quant_core.numerics.sqnr import sqnr_db
from tests.folders import NAMES, START, WORDS, save_folder
from tests.pipeline.conftest import FAST, age

ENCODER, DECODER, _, MERGED = NAMES
GRAPHS = (ENCODER, DECODER, MERGED)


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "model", names=GRAPHS, data="weights.onnx_data")
    texts = np.random.default_rng(1).integers(0, WORDS, (12, 9))
    np.savez(tmp_path / "texts.npz", input_ids=texts, attention_mask=np.ones_like(texts))
    age(tmp_path / "texts.npz")
    return tmp_path


def manifest_of(folder):
    batch = {"input_dir": "model", "output_dir": "out", "layout": "huggingface"}
    return check_manifest({"calibration": {"data": "texts.npz"}, "batch": batch, **FAST}, folder)


def own_weights(folder, name: str) -> set[bytes]:
    """The large weights that lie in the file itself."""
    model = onnx.load(folder / f"onnx/{name}_int8.onnx", load_external_data=False)
    return {t.raw_data for t in model.graph.initializer if len(t.raw_data) >= 1024}


def translate(
    folder, suffix: str, text: np.ndarray, given: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], np.ndarray]:
    """The most likely tokens and the logits of each step, as a program that uses encoder and merged
    decoder gets them.

    given  tokens to go on from, whatever is most likely; without any, six are written
    """
    encoder = open_session(folder / f"onnx/{ENCODER}{suffix}.onnx")
    decoder = open_session(folder / f"onnx/{MERGED}{suffix}.onnx")
    mask = np.ones_like(text)
    (hidden,) = run(encoder, {"input_ids": text, "attention_mask": mask})
    names = [node.name for node in decoder.get_outputs()]
    past = [s.name for s in input_specs(decoder) if s.name.startswith("past")]
    known = {name: np.zeros((1, 2, 0, 16), np.float32) for name in past}
    tokens, logits = [START], []
    for step in range(1, 6):
        feed = {
            "input_ids": np.array([tokens[-1:]]),
            "encoder_attention_mask": mask,
            "encoder_hidden_states": hidden,
            "use_cache_branch": np.array([step > 1]),
            **known,
        }
        made = dict(zip(names, run(decoder, feed), strict=True))
        logits.append(made["logits"][0, -1])
        tokens.append(given[step] if given else int(logits[-1].argmax()))
        known = {name: made[name.replace("past_key_values", "present")] for name in past}
    return tuple(tokens), np.stack(logits)


@pytest.mark.slow
def test_the_graphs_of_a_folder_still_work_together(folder, run):
    manifest, out = manifest_of(folder), folder / "out"

    result = run(manifest)
    shared = (out / "onnx/weights_int8.onnx_data").read_bytes()
    (out / f"onnx/{DECODER}_int8.onnx").unlink()
    again = run(manifest)

    assert result.counts["done"] == 3
    assert (again.counts["skipped"], again.counts["done"]) == (2, 1)
    assert (out / "onnx/weights_int8.onnx_data").read_bytes() == shared
    assert shared
    assert not own_weights(out, DECODER) & own_weights(out, MERGED)
    assert (out / "config.json").read_bytes() == (folder / "model/config.json").read_bytes()
    assert (out / "tokenizer.json").is_file()
    assert sorted(path.name for path in (out / "onnx").glob("*.onnx")) == sorted(
        f"{name}_{suffix}.onnx" for name in GRAPHS for suffix in ("int8", "quantized")
    )
    texts = np.random.default_rng(2).integers(0, WORDS, (10, 1, 8))
    tokens, wanted = zip(*(translate(folder / "model", "", text) for text in texts), strict=True)
    found = [translate(out, "_quantized", *pair)[1] for pair in zip(texts, tokens, strict=True)]
    noise = np.square(np.subtract(found, wanted)).sum()
    db = sqnr_db(float(np.square(wanted).sum()), float(noise))
    assert db > FLOOR_DB[8]
    assert min(row.worst_db for row in result.rows) > 20


def test_a_broken_encoder_fails_with_what_depends_on_it(folder, run):
    (folder / f"model/onnx/{ENCODER}.onnx").write_bytes(b"cut short")
    age(folder / f"model/onnx/{ENCODER}.onnx")

    result = run(manifest_of(folder))

    assert result.counts["failed"] == 3
    errors = {row.model: f"{row.where}: {row.error}" for row in result.rows}
    assert all(f"{ENCODER}.onnx" in error for error in errors.values())
