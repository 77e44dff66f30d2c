"""A metric of the user's own: found by name, called with all outputs, and named if it fails."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from quant_core.errors import DataError, RequestError
from quant_core.evaluate.custom_metric import code_allowed, load_custom_metric
from quant_core.evaluate.fidelity import compare
from tests.unit.evaluate.outputs import feeds, rows


@pytest.fixture
def own_metrics(tmp_path):
    (tmp_path / "own_metrics_of_a_test.py").write_text(
        "import numpy as np\n"
        "def right(outputs, labels): return (outputs['y'].argmax(1) == labels).mean()\n"
        "def lengths(outputs, labels): return sum(a.shape[1] for a in outputs['y'])\n"
        "def axes(outputs, labels): return labels.ndim\n"
        "def fails(outputs, labels): return 1 / 0\n"
        "def nan(outputs, labels): return float('nan')\n"
        "number = 3\n"
    )
    with code_allowed(tmp_path):
        yield "own_metrics_of_a_test"


def test_a_function_of_the_allowed_folder_measures_both_models(own_metrics):
    fidelity = compare(
        rows(np.eye(3)), rows(np.eye(3)[[0, 2, 2]]), ["y"], np.arange(3), f"{own_metrics}:right"
    )

    assert (fidelity.metric_float, fidelity.metric) == (1, 2 / 3)


def test_ragged_outputs_reach_the_function_as_a_list(own_metrics):
    ragged = feeds(np.ones((1, 2)), np.ones((1, 2)), np.ones((1, 3)))

    assert compare(ragged, ragged, ["y"], metric=f"{own_metrics}:lengths").metric == 7


def test_labels_of_any_shape_reach_the_function(own_metrics):
    labels = np.zeros((2, 4, 20), int)

    fidelity = compare(rows(np.eye(2)), rows(np.eye(2)), ["y"], labels, f"{own_metrics}:axes")

    assert (fidelity.metric, fidelity.top1) == (3, None)


@pytest.mark.parametrize(
    ("name", "problem"), [("fails", "ZeroDivisionError"), ("nan", "returned nan")]
)
def test_a_function_that_fails_is_named(own_metrics, name, problem):
    with pytest.raises(DataError, match=problem) as caught:
        compare(rows(np.eye(3)), rows(np.eye(3)), ["y"], metric=f"{own_metrics}:{name}")

    assert caught.value.where == f"{own_metrics}:{name}"


@pytest.mark.parametrize("metric", ["no_such_module_at_all:f", "{}:no_such_function", "{}:number"])
def test_a_function_that_is_not_there_is_a_wrong_request(own_metrics, metric):
    with pytest.raises(RequestError):
        load_custom_metric(metric.format(own_metrics))


def test_code_that_nobody_allowed_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(RequestError, match="--allow-code"):
        load_custom_metric("stranger:f")

    assert not (tmp_path / "ran").exists()


def test_a_function_outside_the_allowed_folder_is_refused(tmp_path):
    with code_allowed(tmp_path), pytest.raises(RequestError, match="is not in"):
        load_custom_metric("os:getcwd")


@pytest.mark.parametrize("metric", ["os:getcwd", "numpy:sum", "numpy.linalg:norm"])
def test_a_folder_named_like_a_package_does_not_open_that_package(tmp_path, metric):
    (tmp_path / metric.partition(":")[0].partition(".")[0]).mkdir()

    with code_allowed(tmp_path), pytest.raises(RequestError, match="is not in"):
        load_custom_metric(metric)


@pytest.mark.parametrize("name", ["json", "time", "numpy"])
def test_a_module_never_takes_the_place_of_another_one(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("def f(outputs, labels): return 1.0")
    before = sys.modules[name]

    with code_allowed(tmp_path), pytest.raises(RequestError, match=f"Rename {name} in"):
        load_custom_metric(f"{name}:f")

    assert sys.modules[name] is before


def test_a_metric_is_read_anew_and_may_import_its_neighbours(tmp_path):
    (tmp_path / "spaces" / "inner").mkdir(parents=True)
    (tmp_path / "spaces" / "inner" / "own.py").write_text(
        "def f(outputs, labels):\n    from a_neighbour_of_it import value\n    return value"
    )
    (tmp_path / "link").symlink_to(tmp_path)
    before = set(sys.modules)

    for value, folder in enumerate((tmp_path, tmp_path / "link", tmp_path)):
        (tmp_path / "a_neighbour_of_it.py").write_text(f"value = {value}{value * ' '}")
        with code_allowed(folder):
            rows_of_one = rows(np.eye(2))
            metric = compare(rows_of_one, rows_of_one, ["y"], metric="spaces.inner.own:f").metric

        assert metric == value
    assert not {name for name in set(sys.modules) - before if "own" in name or "neigh" in name}
