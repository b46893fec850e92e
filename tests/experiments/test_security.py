"""Unsafe calls in the sources, and pinned packages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import ROOT

SOURCES = [path for folder in ("mmfusion", "experiments", "configs") for path in sorted((ROOT / folder).rglob("*.py"))]
# Calls that execute their input, or write to paths taken from their input.
CALLS = {"eval", "exec", "__import__", "os.system", "os.popen", "tempfile.mktemp", "yaml.load", "torch.load"}
METHODS = {"extractall", "extract"}
# Pickles that a command sends to processes that it has started.
BETWEEN_PROCESSES = (
    "mmfusion/data/decode_worker.py", "experiments/benchmark/predict.py", "experiments/benchmark/peers/prediction.py"
)  # fmt: skip
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "tarfile"}


def unsafe_calls(source: str) -> Iterator[str]:
    """Yields each unsafe import or call of a module, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"{node.lineno}: import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in CALLS or called.rpartition(".")[2] in METHODS:
                yield f"{node.lineno}: {called}"
            if called in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                yield f"{node.lineno}: {called} without allow_pickle=False"
            if options.get("shell") == "True":
                yield f"{node.lineno}: {called} with a shell"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "archive.extractall(folder)",
        "np.load(path)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_unsafe_calls_are_detected(source: str):
    assert len(list(unsafe_calls(source))) == 1


def test_sources_contain_no_unsafe_calls():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in SOURCES for line in unsafe_calls(path.read_text())]
    found = [line for line in found if not (line.startswith(BETWEEN_PROCESSES) and line.endswith("import pickle"))]
    assert len(SOURCES) > 100 and found == []


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    pinned = (re.match(r"([A-Za-z0-9_.-]+)==([^\s;]+)", line) for line in lines)
    return {match[1].lower().replace("_", "-"): match[2] for match in pinned if match}


def test_lock_file_contains_every_pin_with_a_hash():
    lock, direct = ROOT / "requirements.lock", pins(ROOT / "requirements.txt")
    locked = pins(lock)
    assert direct.items() <= locked.items()
    assert len(locked) > len(direct)  # includes transitive dependencies
    entries = re.split(r"\n(?=[A-Za-z])", lock.read_text().strip())
    assert {entry.partition("==")[0] for entry in entries} == locked.keys()
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in lock.read_text()
