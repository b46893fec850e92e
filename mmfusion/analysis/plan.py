"""What an ablation runs: every method with every seed and every value to choose from, decided before the first run.

A plan is a file. Runs of one seed see the same examples in the same order and begin with the same encoders.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import mmfusion
from mmfusion import config as configs
from mmfusion.errors import UserError
from mmfusion.logger import write_json

CHOSEN = "optim."  # keys below it are chosen on validation; any other key makes a method of its own


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      name: its directory below `cells/`.
      method: the row of the report that it belongs to.
      floor: whether the method is a modality alone.
      tried: the values, by config key, that validation chooses between.
      config: the whole config as JSON; its seed is the pair.
    """

    name: str
    method: str
    floor: bool
    tried: dict[str, Any]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells, in the order in which they are begun, and what they were planned with."""

    cells: tuple[Cell, ...]
    code: str


Make = Callable[[str, int, str], ConfigDict]  # (fusion or "", seed, modalities or "") -> config


def build(make: Make, fusions: Sequence[str], seeds: int, vary: Mapping[str, Sequence[Any]]) -> Plan:
    """Plans fusions × seeds × values, and each modality alone as the floor, seed by seed.

    Args:
      make: the config of a strategy (empty: the config's own), a seed, and modalities (`image+text`; empty: all).
      fusions: names of strategies.
      seeds: how many: 0, 1, ...
      vary: config key -> values. Keys of the optimizer are chosen on validation, for each method from the same values.

    Raises:
      UserError: nothing to run, a key that the config does not have, or two methods of one name.
    """
    if not fusions or seeds < 1 or not all(vary.values()):
        raise UserError("the grid is empty: give strategies, at least one seed, and a value for each key")
    methods = [(name, name, "") for name in fusions]
    alone = [(f"{m} alone", "", m) for m in sorted(make(fusions[0], 0, "").data.modalities)]
    if len(alone) > 1:
        methods += alone
    cells = []
    for seed, (title, fusion, modality), values in itertools.product(
        range(seeds), methods, itertools.product(*vary.values())
    ):
        config = make(fusion, seed, modality)
        changes = dict(zip(vary, values, strict=True))
        for key, value in changes.items():
            _set(config, key, value)
        tried = {key: value for key, value in changes.items() if key.startswith(CHOSEN)}
        apart = [f"{key}={value}" for key, value in changes.items() if key not in tried]
        method = " ".join([title, *apart])
        name = "_".join([method, *(f"{key}={value}" for key, value in tried.items()), f"seed={seed}"])
        cells.append(Cell(_file_name(name), method, bool(modality), tried, configs.to_json(config)))
    if len({cell.name for cell in cells}) < len(cells):
        raise UserError("two cells of the grid are the same: a strategy or a value is given twice")
    return Plan(tuple(cells), code_digest())


def code_digest() -> str:
    """Returns a digest of the sources that runs depend on: of the whole library but its analysis."""
    root = Path(mmfusion.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(set(root.rglob("*.py")) - set(root.joinpath("analysis").rglob("*.py"))):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def settle(plan: Plan, directory: Path) -> Plan:
    """Writes the plan to `plan.json`, or reads the one that is there, which must be the same.

    Raises:
      UserError: the directory belongs to another ablation, or the code changed since the plan was made.
    """
    path = directory / "plan.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(plan))
        return plan
    saved = configs.read_json(path)
    mine = json.loads(json.dumps(dataclasses.asdict(plan)))
    ours, theirs = ({cell["name"]: cell for cell in one["cells"]} for one in (mine, saved))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            what = "differs" if name in ours and name in theirs else "is there" if name in theirs else "is not there"
            raise UserError(f"{directory} belongs to another ablation: its cell {name} {what}; give another --workdir")
    if mine["code"] != saved["code"]:
        raise UserError(
            f"{directory} was begun with other code ({saved['code']}, now {mine['code']}); check that version out, or "
            "give another --workdir"
        )
    return plan


def _set(config: ConfigDict, key: str, value: Any) -> None:
    section, _, last = key.rpartition(".")
    node = config
    for part in filter(None, section.split(".")):
        if part not in node:
            raise UserError(f"--vary={key}: config.{key} is no key of {config.model.fusion.name}")
        node = node[part]
    if last not in node:
        raise UserError(f"--vary={key}: config.{key} is no key of {config.model.fusion.name}")
    with config.unlocked():
        node[last] = value


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in name)
