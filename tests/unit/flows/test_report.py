"""The page of a run: names are data, the tables read without a script, and it stays small."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser

import pytest

from flows.cli.commands import main
from flows.reading import read_page
from flows.regression import regressions
from flows.report.charts import _ticks, sparkline
from flows.report.details import details
from flows.report.elements import element, pack
from flows.report.page import render_page, write_report
from quant_core.errors import RequestError
from quant_core.search.trace import on_front
from tests.reports import write_reports

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\x1b[31m\u202e"


class Page(HTMLParser):
    """The tags, attributes and cells of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.cells and self.inside not in ("script", "style"):
            self.cells[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder) -> str:
    return render_page(read_page(folder))


def test_names_from_models_are_data_and_never_markup(tmp_path):
    page = page_of(write_reports(tmp_path, [HOSTILE, "b"], failed=["b"], layers=3))

    found = Page(page)
    assert not found.attributes("img")
    assert not found.attributes("b")
    assert "\x1b" not in page
    assert "\u202e" not in page
    visible = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    assert any(cell == visible for cell in found.cells)


def test_packed_details_hold_the_same_names_as_text():
    packed = pack((element("td", {"title": HOSTILE}, HOSTILE),))

    ((tag, attributes, (text,)),) = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert tag == "td"
    assert text.startswith("</script>")
    assert attributes["title"] == text


def test_the_page_asks_no_host_for_anything(tmp_path):
    page = Page(page_of(write_reports(tmp_path, ["a"], layers=3)))

    (policy,) = (m["content"] for m in page.attributes("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    values = [value for _, attributes in page.tags for value in attributes.values() if value]
    assert not [value for value in values if re.match(r"(https?:)?//", value)]
    assert not any("style" in a or any(k.startswith("on") for k in a) for _, a in page.tags)


def test_every_model_and_layer_stands_in_a_table_without_a_script(tmp_path):
    folder = write_reports(tmp_path, ["small", "other"], layers=3)

    cells = Page(page_of(folder)).cells

    assert {"small", "other", "/small/stage0/block2/Conv", "/other/stage0/block0/Conv"} <= {*cells}


def test_the_page_says_which_plan_was_chosen_and_why(tmp_path):
    folder = write_reports(tmp_path, ["a"], layers=3)

    cells = Page(page_of(folder)).cells

    assert "static, channels equalized: as fast as dynamic, and 5.6 dB nearer to float" in cells
    assert cells[cells.index("plan") + 1 :].count("yes") >= 1


def test_the_load_of_a_host_is_a_share_of_it():
    row = {"outcome": "done", "verdict": "none", "host_load": 0.5}

    text = "".join(part.to_html() for part in details(row, [], [], []))

    assert "50 % of this host" in text


def test_columns_that_are_empty_in_all_rows_are_left_out(tmp_path):
    first = Page(page_of(write_reports(tmp_path / "first", ["a"], layers=3))).cells
    second = Page(page_of(write_reports(tmp_path / "second", ["a"], layers=3, runs=2))).cells

    assert "rewritten by" not in first
    assert "trend" not in first
    assert "trend" in second


def test_a_failed_model_shows_no_measurements_of_earlier_runs(tmp_path):
    page = page_of(write_reports(tmp_path, ["a"], runs=2, failed=["a"], layers=3))

    assert "95th percentile" not in page
    assert "/a/stage0/block0/Conv" not in page


def test_ticks_are_round_values_inside_the_axis():
    assert [text for _, text in _ticks(2.21, 2.61)] == ["2.3", "2.4", "2.5", "2.6"]
    assert [text for _, text in _ticks(0, 100)] == ["0", "20", "40", "60", "80", "100"]
    assert [text for _, text in _ticks(-3.0, 41.0)] == ["0", "10", "20", "30", "40"]


def test_failures_and_missed_contracts_are_open_and_the_rest_is_folded(tmp_path):
    names = ["good", "missed", "broken"]
    folder = write_reports(tmp_path, names, failed=["broken"], not_met=["missed"], layers=3)

    page = page_of(folder)

    sections = re.findall(r"<details( open=\"\")?><summary>(\w+)", page)
    assert sections[:3] == [("", "good"), (' open=""', "missed"), (' open=""', "broken")]
    assert "2 of 3 models made, 1 failed, 1 misses its contract" in page


def test_a_model_that_got_worse_since_the_run_before_is_marked(tmp_path):
    folder = write_reports(tmp_path, ["a", "b"], runs=3, slower=["b"], layers=3)

    page = page_of(folder)

    assert "1 got worse since the run before" in page
    assert page.count("slower than before") >= 1
    assert page.count('class="spark"') == 2


def test_a_first_run_and_a_busy_host_are_no_regression():
    now = {"outcome": "done", "verdict": "met", "speedup": 1.0, "busy": True}
    before = {**now, "speedup": 2.0}

    assert regressions(now, None) == []
    assert regressions(now, before) == []
    assert regressions({**now, "busy": False}, {**before, "busy": False}) == ["slower than before"]


def test_the_front_has_the_trials_that_none_beats():
    fast = {"candidate": "fast", "speedup": 3.0, "sqnr_db": 20.0, "size_bytes": 10}
    right = {"candidate": "right", "speedup": 1.0, "sqnr_db": 40.0, "size_bytes": 10}
    worse = {"candidate": "worse", "speedup": 1.0, "sqnr_db": 30.0, "size_bytes": 10}
    failed = {"candidate": "failed", "error": "no kernel"}

    assert on_front([fast, worse, failed, right]) == [fast, right]


@pytest.mark.parametrize("values", [[], [1.0], [None, 2.0, None]])
def test_less_than_two_values_are_no_trend(values):
    assert sparkline(values, "speed") is None


@pytest.mark.parametrize(
    ("count", "megabytes"), [(1, 2), (100, 5), pytest.param(1000, 15, marks=pytest.mark.slow)]
)
def test_the_page_stays_small(tmp_path, count, megabytes):
    folder = write_reports(tmp_path, [f"model {i}" for i in range(count)])

    path = write_report(folder, tmp_path / "report.html")

    assert path.stat().st_size < megabytes * 1e6


def test_each_models_details_stand_on_the_page_once(tmp_path):
    page = page_of(write_reports(tmp_path, [f"m{i}" for i in range(60)], failed=["m7"]))

    packed = re.findall(r'<script type="text/plain">([^<]+)', page)

    assert packed
    unpacked = "".join(gzip.decompress(base64.b64decode(text)).decode() for text in packed)
    for i in range(60):
        node = f"/m{i}/stage0/block3/Conv<"  # the cell's end in HTML, a quote in JSON
        assert page.count(">" + node) + unpacked.count(f'"{node[:-1]}"') == (0 if i == 7 else 1)


def test_report_writes_the_page_of_a_run(tmp_path, capsys):
    folder = write_reports(tmp_path / "out", ["a"], runs=2, layers=3)
    path = tmp_path / "pages" / "report.html"

    code = main(["report", str(folder), "--run", "run-0", "-o", str(path)])

    assert code == 0
    assert "Run run-0" in path.read_text(encoding="utf-8")


def test_a_folder_without_reports_is_a_wrong_request(tmp_path):
    with pytest.raises(RequestError, match="holds no report"):
        write_report(tmp_path, tmp_path / "report.html")
