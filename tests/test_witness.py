"""Losses and parameter norms of a few small runs, compared with recorded values.

After an intended change of results, `MMFUSION_WRITE_GOLDEN=1 python -m pytest tests/test_witness.py` records them anew.
`python -m tests.witness` compares two versions bit by bit in many more runs.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import witness, witness_comparison
from tests.witness_cases import Case, few_cases

GOLDEN = Path(__file__).parent / "golden" / "witness.json"
WRITE = os.environ.get("MMFUSION_WRITE_GOLDEN") == "1"
# Processors round differently, because instructions and summation order differ. Rounding differences grow with each
# step, so the runs are short.
TOLERANCE = 1e-5
# Discrete values, which a single example at a decision boundary changes.
EXCLUDED = ("accuracy", "ids", "step")


def golden_of(record: witness.Record) -> dict[str, list[Any]]:
    """Returns the recorded values of a run: example ids, logged metrics, and the final norm of each module."""
    series = {f"train/{name}": values for name, values in record["train"].items()}
    series["valid/loss"] = record["valid"]["loss"]
    squares: dict[str, float] = {}
    for path, (*_, norm) in record["state"].items():
        if path.startswith("params/"):
            module = path.split("/")[1]
            squares[module] = squares.get(module, 0.0) + norm**2
    series |= {f"norm/{module}": [math.sqrt(square)] for module, square in squares.items()}
    kept = {name: values for name, values in sorted(series.items()) if name.rpartition("/")[2] not in EXCLUDED}
    return {"ids": record["train"]["ids"]} | {name: [float(f"{x:.9g}") for x in row] for name, row in kept.items()}


def differences(golden: dict[str, list[Any]], found: dict[str, list[Any]]) -> list[str]:
    """Returns a line for each series of values that differs from the golden file."""
    lines = []
    for name in sorted({*golden, *found}):
        expected, actual = golden.get(name), found.get(name)
        if name == "ids" or expected is None or actual is None or len(expected) != len(actual):
            lines += [f"{name} was {expected} and is {actual}"] * (expected != actual)
            continue
        largest = max(
            witness_comparison.relative(one, other, witness_comparison.FLOOR)
            for one, other in zip(expected, actual, strict=True)
        )
        if largest > TOLERANCE:
            lines.append(f"{name} differs by {largest:.1e}: was {expected} and is {actual}")
    return lines


def write(name: str, found: dict[str, list[Any]]) -> None:
    """Writes a case to the golden file, with one line per series."""
    GOLDEN.parent.mkdir(exist_ok=True)
    cases = {**(json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}), name: found}
    rows = lambda series: ",\n".join(f"  {json.dumps(one)}: {json.dumps(values)}" for one, values in series.items())  # noqa: E731
    parts = [f" {json.dumps(one.name)}: {{\n{rows(cases[one.name])}\n }}" for one in few_cases() if one.name in cases]
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@pytest.fixture
def train(command: Callable[..., Any]) -> witness.Train:
    def train(flags: list[str], devices: int) -> tuple[int, str]:
        process = command("experiments.train", *flags, **witness.environment(devices))
        return process.returncode, process.stderr

    return train


@pytest.mark.thorough(but=("objectives on devices",))
@pytest.mark.parametrize("case", few_cases(), ids=lambda case: case.name)
def test_training_matches_the_golden_file(case: Case, data_dir: str, train: witness.Train, tmp_path: Path):
    record = witness.record_case(case, tmp_path, {"data.dir": data_dir}, train)
    assert record["status"] == 0, record["error"]
    found = golden_of(record)
    if WRITE:
        write(case.name, found)
    assert differences(json.loads(GOLDEN.read_text())[case.name], found) == []


def test_compare_cases_detects_a_planted_difference():
    record = {"status": 0, "error": "", "train": {"step": [1], "ids": [5], "loss": [0.7]}, "valid": {}, "result": {}}
    record["state"] = {"params/kernel": [[2], "float32", "0a", 1.0, 1.0]}
    changed = json.loads(json.dumps(record))
    assert witness_comparison.compare_cases(record, changed).equal
    changed["train"]["loss"] = [0.7 * (1 + 1e-7)]
    close = witness_comparison.compare_cases(record, changed)
    assert not close.equal and close.fits(witness_comparison.TOLERANCE)
    changed["state"]["params/kernel"] = [[2], "float32", "0b", 1.0, 1.00001]
    assert not witness_comparison.compare_cases(record, changed).fits(witness_comparison.TOLERANCE)
    changed = json.loads(json.dumps(record))
    changed["train"]["ids"] = [6]
    assert witness_comparison.compare_cases(record, changed).wrong == ["train ids was [5] and is [6]"]
    changed["state"] = {"params/renamed": changed["state"]["params/kernel"]}
    renamed = witness_comparison.compare_cases(record, changed)
    assert len(renamed.wrong) == 1 and len(renamed.warnings) == 2
    changed["state"]["params/renamed"][2] = "0c"
    assert len(witness_comparison.compare_cases(record, changed).wrong) == 2


def test_compare_cases_separates_rounding_from_other_differences():
    arrays = {"kernel": ("0a", 1.0, 1e-4), "bias": ("0b", 0.003, 1e-18)}
    state = {f"params/{name}": [[2], "float32", digest, x, x] for name, (digest, x, _) in arrays.items()}
    state |= {f"opt_state/nu/{name}": [[2], "float32", digest, x, x] for name, (digest, _, x) in arrays.items()}
    record = {"status": 0, "error": "", "train": {}, "result": {}, "state": state}
    record["valid"] = {"step": [1], "loss": [0.7]}
    changed = json.loads(json.dumps(record))
    changed["valid"]["loss"] = [0.701]
    changed["state"]["params/bias"][2:] = ["0c", 0.004, 0.004]
    rounded = witness_comparison.compare_cases(record, changed)
    assert rounded.fits(witness_comparison.TOLERANCE) and not rounded.fits(witness_comparison.TOLERANCE, rounding=False)
    changed["state"]["params/kernel"][2:] = ["0d", 1.001, 1.001]
    assert not witness_comparison.compare_cases(record, changed).fits(witness_comparison.TOLERANCE)
