"""Training computes what it computed before: losses and weights of a few small runs, as they were recorded.

What a change means to compute otherwise is recorded anew by `MMFUSION_WRITE_GOLDEN=1 python -m pytest
tests/test_witness.py`. `python -m tests.witness` compares two versions by many more runs, and to the bit.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import witness
from tests.witness_cases import Case, few_cases

GOLDEN = Path(__file__).parent / "golden" / "witness.json"
WRITE = os.environ.get("MMFUSION_WRITE_GOLDEN") == "1"
# Processors round differently: they have other instructions, and sum in another order. What follows from rounding grows
# with each step, so the runs are short.
TOLERANCE = 1e-5
# Counts that one example at a boundary changes.
LEFT_OUT = ("accuracy", "ids", "step")


def golden_of(record: witness.Record) -> dict[str, list[Any]]:
    """Returns what is kept of a run: which examples, what was computed of them, and how large the weights became."""
    series = {f"train/{name}": values for name, values in record["train"].items()}
    series["valid/loss"] = record["valid"]["loss"]
    squares: dict[str, float] = {}
    for path, (*_, norm) in record["state"].items():
        if path.startswith("params/"):
            module = path.split("/")[1]
            squares[module] = squares.get(module, 0.0) + norm**2
    series |= {f"norm/{module}": [math.sqrt(square)] for module, square in squares.items()}
    kept = {name: values for name, values in sorted(series.items()) if name.rpartition("/")[2] not in LEFT_OUT}
    return {"ids": record["train"]["ids"]} | {name: [float(f"{x:.9g}") for x in row] for name, row in kept.items()}


def differences(golden: dict[str, list[Any]], found: dict[str, list[Any]]) -> list[str]:
    """Returns a line for each series of numbers that is not what it was."""
    lines = []
    for name in sorted({*golden, *found}):
        was, now = golden.get(name), found.get(name)
        if name == "ids" or was is None or now is None or len(was) != len(now):
            lines += [f"{name} was {was} and is {now}"] * (was != now)
            continue
        worst = max(witness.relative(one, other, witness.FLOOR) for one, other in zip(was, now, strict=True))
        if worst > TOLERANCE:
            lines.append(f"{name} differs by {worst:.1e}: was {was} and is {now}")
    return lines


def write(name: str, found: dict[str, list[Any]]) -> None:
    """Puts what was found of a case into the golden file, one line a series."""
    GOLDEN.parent.mkdir(exist_ok=True)
    known = {**(json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}), name: found}
    rows = lambda series: ",\n".join(f"  {json.dumps(one)}: {json.dumps(values)}" for one, values in series.items())  # noqa: E731
    parts = [f" {json.dumps(one.name)}: {{\n{rows(known[one.name])}\n }}" for one in few_cases() if one.name in known]
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")


@pytest.fixture
def train(command: Callable[..., Any]) -> witness.Train:
    def train(flags: list[str], devices: int) -> tuple[int, str]:
        done = command("experiments.train", *flags, **witness.environment(devices))
        return done.returncode, done.stderr

    return train


@pytest.mark.parametrize("case", few_cases(), ids=lambda case: case.name)
def test_training_computes_what_it_did(case: Case, data_dir: str, train: witness.Train, tmp_path: Path):
    record = witness.record_case(case, tmp_path, {"data.dir": data_dir}, train)
    assert record["status"] == 0, record["error"]
    found = golden_of(record)
    if WRITE:
        write(case.name, found)
    assert differences(json.loads(GOLDEN.read_text())[case.name], found) == []


def test_a_planted_difference_is_found():
    record = {"status": 0, "error": "", "train": {"step": [1], "ids": [5], "loss": [0.7]}, "valid": {}, "result": {}}
    record["state"] = {"params/kernel": [[2], "float32", "0a", 1.0, 1.0]}
    changed = json.loads(json.dumps(record))
    assert witness.compare_cases(record, changed).equal
    changed["train"]["loss"] = [0.7 * (1 + 1e-7)]
    close = witness.compare_cases(record, changed)
    assert not close.equal and close.fits(witness.TOLERANCE)
    changed["state"]["params/kernel"] = [[2], "float32", "0b", 1.0, 1.00001]
    assert not witness.compare_cases(record, changed).fits(witness.TOLERANCE)
    changed = json.loads(json.dumps(record))
    changed["train"]["ids"] = [6]
    assert witness.compare_cases(record, changed).wrong == ["train ids was [5] and is [6]"]
    changed["state"] = {"params/renamed": changed["state"]["params/kernel"]}
    renamed = witness.compare_cases(record, changed)
    assert len(renamed.wrong) == 1 and len(renamed.warnings) == 2
    changed["state"]["params/renamed"][2] = "0c"
    assert len(witness.compare_cases(record, changed).wrong) == 2


def test_what_follows_from_rounding_is_told_from_what_does_not():
    arrays = {"kernel": ("0a", 1.0, 1e-4), "bias": ("0b", 0.003, 1e-18)}
    state = {f"params/{name}": [[2], "float32", digest, x, x] for name, (digest, x, _) in arrays.items()}
    state |= {f"opt_state/nu/{name}": [[2], "float32", digest, x, x] for name, (digest, _, x) in arrays.items()}
    record = {"status": 0, "error": "", "train": {}, "result": {}, "state": state}
    record["valid"] = {"step": [1], "loss": [0.7]}
    changed = json.loads(json.dumps(record))
    changed["valid"]["loss"] = [0.701]
    changed["state"]["params/bias"][2:] = ["0c", 0.004, 0.004]
    lagging = witness.compare_cases(record, changed)
    assert lagging.fits(witness.TOLERANCE) and not lagging.fits(witness.TOLERANCE, rounding=False)
    changed["state"]["params/kernel"][2:] = ["0d", 1.001, 1.001]
    assert not witness.compare_cases(record, changed).fits(witness.TOLERANCE)
