"""Timings are kept, are not measured again, and decide a search in the same way again."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.timing import Timing
from quant_core.evaluate.timing_cache import Cost, TimingCache, cpu_fingerprint
from quant_core.search import bench, matmul_costs, prepared, single_matmuls
from tests.models import sketch
from tests.oracle.cases import weights


def timing(float_ms: float, speedup: float) -> Timing:
    return Timing(
        float_ms, float_ms / speedup, float_ms, float_ms / speedup, speedup, speedup, speedup, 5, 1
    )


def refuse() -> Timing:
    raise AssertionError("timed again")


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_cost_is_measured_once_and_kept_for_whoever_reads_the_file_next(tmp_path):
    path = tmp_path / "costs.jsonl"
    cache = TimingCache(path)

    assert cache.of("a product", lambda: timing(2.0, 4.0)) == Cost(2.0, 4.0)
    assert cache.of("a product", refuse).quantized_ms == 0.5
    assert TimingCache(path).of("a product", refuse) == Cost(2.0, 4.0)
    assert TimingCache(path).of("another", lambda: timing(1.0, 1.0)) == Cost(1.0, 1.0)
    assert [row["what"] for row in rows(path)] == ["a product", "another"]


def test_of_two_lines_the_first_counts_and_those_of_other_cpus_do_not(tmp_path):
    path = tmp_path / "costs.jsonl"
    lines = [("Another CPU", 1.0), (cpu_fingerprint(), 2.0), (cpu_fingerprint(), 3.0)]
    path.write_text(
        "\n".join(
            json.dumps({"cpu": cpu, "what": "x", "float_ms": ms, "speedup": 1.0})
            for cpu, ms in lines
        )
    )

    assert TimingCache(path).of("x", refuse).float_ms == 2.0


def test_what_a_crash_cut_short_spoils_nothing_that_is_added_later(tmp_path):
    path = tmp_path / "costs.jsonl"
    TimingCache(path).of("first", lambda: timing(1.0, 1.0))
    path.write_bytes(path.read_bytes() + b'\n{"cpu": "so')
    TimingCache(path).of("second", lambda: timing(2.0, 1.0))
    again = TimingCache(path)
    assert [again.of(what, refuse).float_ms for what in ("first", "second")] == [1.0, 2.0]
    assert again.skipped_lines == 1


@pytest.mark.parametrize(
    "torn", [b'{"cpu": "so', b"\0" * 64, b"null", b'{"cpu": 1, "float_ms": 1e999}']
)
def test_a_table_of_which_no_line_is_whole_is_begun_anew(tmp_path, torn):
    path = tmp_path / "costs.jsonl"
    path.write_bytes(b'{"cpu": 1}\n' + torn)

    TimingCache(path).of("first", lambda: timing(1.0, 1.0))

    assert TimingCache(path).of("first", refuse) == Cost(1.0, 1.0)


def test_many_can_add_to_one_file(tmp_path):
    path = tmp_path / "costs.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda k: TimingCache(path).of(str(k), lambda: timing(1.0 + k, 1.0)), range(64)
            )
        )
    kept = TimingCache(path)
    assert [kept.of(str(k), refuse).float_ms for k in range(64)] == [1.0 + k for k in range(64)]


@pytest.mark.parametrize(
    "content",
    [b"models:\n  - input: m.onnx\n", b"\xff\xfe", b"\x08\x08\n{\x12\n{", b'{\n "config": {}}\n'],
)
def test_a_file_that_is_no_table_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "costs.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="holds no costs"):
        TimingCache(path)
    assert path.read_bytes() == content


def test_a_table_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(RequestError, match="lies in no folder"):
        TimingCache(tmp_path / "missing" / "costs.jsonl")
    with pytest.raises(RequestError, match="cannot be read"):
        TimingCache(tmp_path)


# A search that reads the table

THREE_MATMULS = """(float[n,64] x) => (float[n,16] y) {
    a = MatMul(x, u) r = Relu(a) b = MatMul(r, v) s = Relu(b) y = MatMul(s, w)
}"""


class Searched:
    """A model of three MatMuls, its samples, and the table that a first search leaves."""

    def __init__(self, folder: Path) -> None:
        self.model, self.table, self.output = (
            folder / "m.onnx",
            folder / "costs.jsonl",
            folder / "out.onnx",
        )
        onnx.save(sketch(THREE_MATMULS, weights(u=(64, 96), v=(96, 48), w=(48, 16))), self.model)
        self.x = np.random.default_rng(0).standard_normal((16, 64), dtype=np.float32)
        self.plan = self.search()

    def search(self):
        found = quantize_model(self.model, self.output, calibration=self.x, costs=self.table)
        self.bytes, self.trace = self.output.read_bytes(), found.trace
        return found.plan

    def set_costs(self, what: str, float_ms: float, speedup: float, but: str = "\0") -> None:
        """Write this cost for all rows of the table whose name holds `what` and not `but`."""
        table = rows(self.table)
        for row in table:
            if what in row["what"] and but not in row["what"]:
                row |= {"float_ms": float_ms, "speedup": speedup}
        self.table.write_text("\n".join(map(json.dumps, table)))

    def measured(self) -> set[object]:
        return {row["what"] for row in rows(self.table)}

    def computes(self) -> dict[str, str]:
        return {n.node: n.compute for n in self.plan.nodes if n.weights}


@pytest.fixture
def searched(tmp_path, equal_times) -> Searched:
    """Only the table decides."""
    return Searched(tmp_path)


def test_with_a_table_that_knows_all_nothing_is_timed_and_the_bytes_are_the_same(
    searched, monkeypatch
):
    first, table = searched.bytes, searched.table.read_bytes()
    for module in (bench, matmul_costs, prepared):
        monkeypatch.setattr(module, "measure", lambda *_, **__: refuse())

    searched.search()

    assert searched.bytes == first
    assert searched.table.read_bytes() == table


def test_a_product_computes_in_the_way_that_costs_least_by_itself(searched):
    searched.set_costs("by plan", 4.0, 2.0)  # whole candidates are alike
    searched.set_costs("MatMul", 1.0, 2.0)
    searched.set_costs("MatMul", 1.0, 1.0, but="float")
    searched.set_costs("96x48", 1.0, 3.0, but="float")
    before = searched.measured()

    searched.search()

    mixed = next(
        row["candidate"] for row in searched.trace if "by their own cost" in row["candidate"]
    )
    assert mixed.endswith("2 MatMuls by their own cost")
    (fresh,) = searched.measured() - before

    searched.set_costs(fresh, 4.0, 3.0)
    searched.search()  # it is the fastest now, and raced again
    searched.set_costs(fresh, 4.0, 3.0)
    searched.plan = searched.search()

    assert searched.measured() == before | {fresh, f"{fresh} again"}
    assert {n for n, compute in searched.computes().items() if compute == "float"} == {"a", "y"}


def test_products_are_left_as_they_are_where_that_would_save_next_to_nothing(searched):
    searched.set_costs("model", 1000.0, 2.0)
    searched.set_costs("MatMul", 1.0, 1.0)
    searched.set_costs("float", 1.0, 2.0)
    searched.search()
    assert not [row for row in searched.trace if "by their own cost" in row["candidate"]]


def test_a_product_that_does_not_run_by_itself_costs_nothing_but_a_line(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ModelError("a part does not run")

    monkeypatch.setattr(single_matmuls, "matmul_costs", fails)

    searched = Searched(tmp_path)

    assert {
        "candidate": "single MatMuls by their own cost",
        "error": "a part does not run",
    } in searched.trace
    assert searched.output.exists()


def test_of_two_processes_that_time_one_thing_at_once_both_go_by_the_first(tmp_path):
    path = tmp_path / "costs.jsonl"
    one, other = TimingCache(path), TimingCache(path)

    def meanwhile():
        one.of("x", lambda: timing(1.0, 1.0))
        return timing(2.0, 1.0)

    assert other.of("x", meanwhile) == Cost(1.0, 1.0) == TimingCache(path).of("x", refuse)
    assert TimingCache(path).skipped_lines == 0


def test_what_another_process_has_timed_meanwhile_is_not_timed_again(tmp_path):
    path = tmp_path / "costs.jsonl"
    one, other = TimingCache(path), TimingCache(path)
    one.of("x", lambda: timing(1.0, 1.0))
    one.of("y", lambda: timing(2.0, 1.0))

    assert [other.of(what, refuse).float_ms for what in "xy"] == [1.0, 2.0]
