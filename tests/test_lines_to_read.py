"""Limits on the lines of code behind the train step and loop, and on the import graph."""

from pathlib import Path

import pytest

from tests import lines_to_read
from tests.lines_to_read import LOOP, STEP
from tests.processes import ROOT

FILES = lines_to_read.modules(ROOT)


@pytest.fixture(scope="module")
def graph() -> lines_to_read.Graph:
    return lines_to_read.import_graph(FILES)


def test_import_graph_is_acyclic_with_at_most_16_packages_in_10_layers(graph: lines_to_read.Graph):
    packages = lines_to_read.package_graph(graph, FILES)
    assert len(packages) <= 16
    assert len(lines_to_read.layers(packages)) <= 10
    lines_to_read.layers(graph)  # raises if imports between modules are cyclic


def test_package_root_has_at_most_six_modules():
    modules = [path for path in (ROOT / "mmfusion").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 6


def test_lines_to_read_of_step_and_loop_are_at_most_1600(graph: lines_to_read.Graph):
    names = lines_to_read.modules_to_read(STEP, graph, FILES) | lines_to_read.modules_to_read(LOOP, graph, FILES)
    assert lines_to_read.count_lines(names, FILES) <= 1600


def test_layers_reports_an_import_cycle():
    graph = {"low": set(), "a": {"low", "b"}, "b": {"c"}, "c": {"a"}, "above": {"a"}}
    with pytest.raises(ValueError, match="cyclic imports: a -> b -> c -> a"):
        lines_to_read.layers(graph)
    assert lines_to_read.layers({"low": set(), "a": {"low"}, "b": {"a", "low"}}) == [["low"], ["a"], ["b"]]


def test_modules_to_read_follow_packages_but_exclude_the_data(tmp_path: Path):
    texts = {
        "mmfusion/step.py": "from mmfusion import optim\nfrom mmfusion.data.batch import Batch\n",
        "mmfusion/optim/__init__.py": "from mmfusion.optim.sgd import sgd\n",
        "mmfusion/optim/sgd.py": "def sgd():\n    from mmfusion import errors\n",
        "mmfusion/errors.py": "",
        "mmfusion/data/batch.py": "",
        "mmfusion/unrelated.py": "",
    }
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    files = lines_to_read.modules(tmp_path)
    graph = lines_to_read.import_graph(files)
    assert graph["mmfusion.optim.sgd"] == {"mmfusion.errors"}  # imported in a function
    names = lines_to_read.modules_to_read("mmfusion.step", graph, files)
    assert names == {"mmfusion.step", "mmfusion.optim", "mmfusion.optim.sgd"}
    assert lines_to_read.count_lines(names, files) == 5
