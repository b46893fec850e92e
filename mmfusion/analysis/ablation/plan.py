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

from mmfusion import config as configs
from mmfusion.errors import UserError
from mmfusion.files import write_json

PLAN = "plan.json"
REFERENCE = "concat"  # the strategy that the others are compared with
CHOSEN = "optim."  # keys below it are chosen on validation; any other key makes a method of its own
MODALITIES = "modalities"  # a key beside the config's, such as image+text
OBJECTIVES = "objectives"  # likewise, such as mvae+unimodal, or none
OF_FUSION = (MODALITIES, OBJECTIVES, "model.fusion.")
ONE_TEST_SET = ("name", "train", "valid", "test", "valid_fraction", "group", "targets")  # of config.data


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      name: its directory below `cells/`.
      method: the row of the report that it belongs to.
      fusion, variation: the strategy, empty where it is the config's own, and what else makes the method.
      floor: whether the method is a modality alone, of several that there are.
      tried: the values, by config key, that validation chooses between.
      config: the whole config as JSON; its seed is the pair.
    """

    name: str
    method: str
    fusion: str
    variation: str
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
        The key `modalities` says which the strategies have (`image+text`), `objectives` which are added to the config's
        own, with their defaults (`mvae+unimodal`, `none`). A modality alone has no key of another.

    Raises:
      UserError: nothing to run, a key that the config does not have or that changes what is tested, or two methods of
        one name.
    """
    for key in vary:
        section, _, rest = key.partition(".")
        if section == "data" and rest.partition(".")[0] in ONE_TEST_SET:
            raise UserError(f"--vary={key}: all methods are compared on one test set; run an ablation for each")
    if not fusions or seeds < 1 or not all(vary.values()):
        raise UserError("the grid is empty: give strategies, at least one seed, and a value for each key")
    methods = [(name, name, "") for name in fusions]
    alone = [(f"{m} alone", "", m) for m in sorted(make(fusions[0], 0, "").data.modalities)]
    if len(alone) > 1:
        methods += alone
    cells: dict[str, Cell] = {}
    for seed, (title, fusion, modality), values in itertools.product(
        range(seeds), methods, itertools.product(*vary.values())
    ):
        changes = dict(zip(vary, values, strict=True))
        config = make(fusion, seed, modality or changes.get(MODALITIES, ""))
        for key in sorted(changes, key=lambda key: not key.endswith(".name")):  # a choice brings its own keys
            if modality and (key.startswith(OF_FUSION) or not _has(config, key)):
                del changes[key]  # what it does not have, cannot vary
            elif key == OBJECTIVES:
                _add_objectives(config, changes[key])
            elif key != MODALITIES:
                _set(config, key, changes[key])
        tried = {key: value for key, value in changes.items() if key.startswith(CHOSEN)}
        variation = " ".join(f"{key}={value}" for key, value in changes.items() if key not in tried)
        method = " ".join(filter(None, [title, variation]))
        name = _file_name("_".join([method, *(f"{key}={value}" for key, value in tried.items()), f"seed={seed}"]))
        floor = len(config.data.modalities) < min(2, len(alone))
        cell = Cell(name, method, fusion, variation, floor, tried, configs.to_json(config))
        if name in cells and not modality:  # of modalities alone, several values may be the same cell
            raise UserError("two cells of the grid are the same: a strategy or a value is given twice")
        cells[name] = cell
    return Plan(tuple(cells.values()), code_digest())


def trial_source(source: str, fusion: str, seed: int) -> str:
    """Returns `FILE:key=value,...` with a strategy ("": the config's own) and a seed."""
    path, _, arg = source.partition(":")
    given = [item.partition("=")[0] for item in arg.split(",")]
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        if key in given:
            raise UserError(f"the ablation sets {key}; give {flag}", path="--config", value=source)
    items = [arg, f"fusion={fusion}" if fusion else "", f"seed={seed}"]
    return f"{path}:{','.join(filter(None, items))}"


def code_digest(of: Sequence[str] = ()) -> str:
    """Returns a digest of the sources that runs depend on, the library but its analysis, or of modules of that."""
    root = Path(__file__).parents[2]
    analysis = root / "analysis"
    paths = [analysis / f"{name}.py" for name in of] or set(root.rglob("*.py")) - set(analysis.rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def settle(plan: Plan, directory: Path) -> Plan:
    """Writes the plan to `plan.json`, where one is of the same cells, or of fewer: seeds and methods may be added.

    Raises:
      UserError: the directory belongs to another ablation, or the code changed since the plan was made.
    """
    path = directory / PLAN
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(plan))
        return plan
    saved = configs.read_json(path)
    mine = json.loads(json.dumps(dataclasses.asdict(plan)))
    ours, theirs = ({cell["name"]: cell for cell in one["cells"]} for one in (mine, saved))
    for name in theirs:
        if ours.get(name) != theirs[name]:
            what = "differs" if name in ours else "is there"
            raise UserError(f"{directory} belongs to another ablation: its cell {name} {what}; give another --workdir")
    if mine["code"] != saved["code"]:
        raise UserError(
            f"{directory} was begun with other code ({saved['code']}, now {mine['code']}); check that version out, or "
            "give another --workdir"
        )
    if ours != theirs:  # it has grown
        write_json(path, mine)
    return plan


def _set(config: ConfigDict, key: str, value: Any) -> None:
    section, _, last = key.rpartition(".")
    if not _has(config, key):
        raise UserError(f"--vary={key}: config.{key} is no key of {config.model.fusion.name}")
    if last == "name" and section in configs.sections_that_choose(config):
        configs.choose(config, section, value)
        return
    node = config
    for part in filter(None, section.split(".")):
        node = node[part]
    with config.unlocked():
        node[last] = value


def _add_objectives(config: ConfigDict, names: str) -> None:
    with config.unlocked():
        for name in str(names).split("+"):
            if name in config.objectives:
                raise UserError(f"--vary={OBJECTIVES}={names}: the config has {name} already, in every method")
            if name != "none":
                config.objectives[name] = ConfigDict(configs.choice_keys(OBJECTIVES, name))


def _has(config: ConfigDict, key: str) -> bool:
    node = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            return False
        node = node[part]
    return True


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in name)
