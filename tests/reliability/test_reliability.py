"""A small share of what `tests.reliability` does, and that it sees what does not survive."""

import dataclasses
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfusion import config as configs
from mmfusion.data.builders import archives
from tests.reliability import faults, fuzz, runs
from tests.reliability.faults import Outcome


@pytest.fixture(scope="module")
def places(data_dir: str) -> list[str]:
    return [f"--config.data.dir={data_dir}"]


def lost(outcomes: list[Outcome]) -> list[str]:
    return [said for survived, said in outcomes if not survived]


def test_hostile_configs_and_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert lost(list(fuzz.fuzzed_configs(150, tmp_path, ()))) == []
    outcomes = list(fuzz.fuzzed_archives(300, tmp_path, ()))
    assert len(outcomes) == 300 and lost(outcomes) == []
    monkeypatch.setattr(archives, "ZIP_ERRORS", (zipfile.BadZipFile,))  # which is not all that is raised
    assert lost(list(fuzz.fuzzed_archives(300, tmp_path, ()))) != []


def test_every_case_is_a_config(places: list[str]):
    assert len(runs.CASES) == 5
    for case in (*runs.CASES, runs.SHORTEST, faults.HOSTS):
        configs.check(runs.cli.make_config(case.source, (*case.changes, *places)), case.devices)


def test_runs_survive(places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "CASES", [runs.SHORTEST])
    for fault, count in ((faults.kills, 1), (faults.bit_flips, 3), (faults.nan_planted, 2), (faults.failing_writes, 2)):
        folder = tmp_path / fault.__name__
        folder.mkdir()
        outcomes = list(fault(count, folder, places))
        assert len(outcomes) >= count and lost(outcomes) == [], fault.__name__
    # the layer that fails reaches Python's files and those that Orbax's own writer opens
    assert int(re.search(r"call \d+ of (\d+)", outcomes[0][1])[1]) > 20


@pytest.mark.spread
@pytest.mark.parametrize("fault", [faults.killed_hosts, faults.killed_ablations])
def test_processes_together_survive(fault: Callable[..., Any], places: list[str], tmp_path: Path):
    outcomes = list(fault(1, tmp_path, places))
    assert len(outcomes) == 1 and lost(outcomes) == []


def test_a_soak_sees_whether_memory_is_flat(places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(faults, "CASES", [runs.SHORTEST])
    assert lost(list(faults.soak(8, tmp_path, places))) == []
    start = [100.0] * 50
    assert faults.flat([*start, *[500.0 + i % 7 for i in range(350)]])
    assert not faults.flat([*start, *[500.0 + 0.1 * i for i in range(350)]])  # 4 MB of 500 a tenth of the time


def test_a_difference_is_seen(places: list[str], tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    runs.whole(runs.SHORTEST, one, places)
    changed = (*runs.SHORTEST.changes, "--config.optim.learning_rate=0.0011")
    runs.whole(dataclasses.replace(runs.SHORTEST, changes=changed), other, places)
    found = runs.differences(one, other)
    assert re.match(r"step \d+: ", found[0])
    assert any(line.startswith("state params/") for line in found)
    assert runs.differences(one, one) == []


def test_the_command_writes_its_table(command: Callable[..., Any], tmp_path: Path):
    table = tmp_path / "table.md"
    for fault, share in (("fuzzed_archives", "0.02"), ("fuzzed_configs", "0.002"), ("fuzzed_archives", "0.01")):
        done = command("tests.reliability", fault, f"--share={share}", f"--output={table}")
        assert done.returncode == 0, done.stderr
    configs, archives = table.read_text().splitlines()[-2:]
    assert configs.startswith("| fuzzed_configs | a config made at random | 2 | taken, or refused in a line | 2 |")
    assert archives.startswith("| fuzzed_archives | an archive damaged or hostile | 10 | as it was, or refused | 10 |")
    assert archives in done.stdout
    assert command("tests.reliability", "fuzz").returncode == 2
