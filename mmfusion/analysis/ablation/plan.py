"""The plan of an ablation: every method with every seed and hyperparameter, fixed before the first run.

A plan is a JSON file. Runs with the same seed see the same examples in the same order and start from the same encoder
parameters.
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
from mmfusion.config.published import adopt
from mmfusion.errors import UserError
from mmfusion.files import write_json

PLAN = "plan.json"
REFERENCE = "concat"  # the strategy that the others are compared with
SEARCH_PREFIX = "optim."  # values of these keys are selected on validation; any other key defines further methods
MODALITIES = "modalities"  # not a config key; values such as image+text
OBJECTIVES = "objectives"  # not a config key; values such as mvae+unimodal, or none
FUSION_KEYS = (MODALITIES, OBJECTIVES, "model.fusion.", "data.missing_in")  # they do not apply to a unimodal baseline
TEST_SET_KEYS = (  # of config.data
    "name", "train", "valid", "test", "valid_fraction", "test_fraction", "group", "folds", "fold_by", "fold", "time",
    "targets",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training run of the plan.

    Attributes:
      name: its directory below `trials/`.
      method: its row in the report.
      fusion: the strategy; empty: the config's own.
      variation: the values, other than the strategy, that define the method.
      unimodal_baseline: whether the method has one of several modalities.
      hyperparameters: the values, by config key, that are selected on validation.
      config: the complete config as JSON; trials are paired by its seed, and its fold if there are folds.
    """

    name: str
    method: str
    fusion: str
    variation: str
    unimodal_baseline: bool
    hyperparameters: dict[str, Any]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All trials in starting order, and the digest of the code that planned them."""

    trials: tuple[Trial, ...]
    code: str


MakeConfig = Callable[[str, int, str], ConfigDict]  # (fusion or "", seed, modalities or "") -> config


def fold_of(trial: Trial) -> int | None:
    """Returns the fold that a trial is tested on; None without folds."""
    data = trial.config["data"]
    return data["fold"] if data.get("folds") or data.get("fold_by") else None


def build(
    make: MakeConfig,
    fusions: Sequence[str],
    seeds: int,
    vary: Mapping[str, Sequence[Any]],
    folds: Sequence[int] = (),
    first_seed: int = 0,
) -> Plan:
    """Plans folds × seeds × fusions × values, and each modality alone as a unimodal baseline, fold by fold.

    Args:
      make: returns the config for a strategy (empty: the config's own), a seed, and modalities (`image+text`; empty:
        all).
      fusions: names of strategies.
      seeds: the number of seeds, from `first_seed` on.
      vary: config key -> values. Keys of the optimizer are a search space: validation selects one value per method.
        The key `modalities` sets the modalities of the strategies (`image+text`), `objectives` adds objectives with
        their defaults to the config's own (`mvae+unimodal`, `none`). A unimodal baseline ignores the keys that it does
        not have.
      folds: the folds, each of which is the test split of all methods and seeds; empty: without folds.
      first_seed: the first seed.

    Raises:
      UserError: there is nothing to run, a key does not exist or changes the test set, or two methods have the same
        name.
    """
    for key in vary:
        section, _, rest = key.partition(".")
        if section == "data" and rest.partition(".")[0] in TEST_SET_KEYS:
            message = "changes the test set, which all methods must share; run one ablation per value"
            raise UserError(message, path="--vary", value=key)
    if not fusions or seeds < 1 or not all(vary.values()):
        raise UserError("the plan has no trials: give strategies, at least one seed, and a value for each key")
    modalities = sorted(make(fusions[0], 0, "").data.modalities)
    methods = [(name, name, "") for name in fusions]
    if len(modalities) > 1:
        methods += [(f"{m} alone", "", m) for m in modalities]
    trials: dict[str, Trial] = {}
    for fold, seed, (title, fusion, modality), values in itertools.product(
        folds or (None,), range(first_seed, first_seed + seeds), methods, itertools.product(*vary.values())
    ):
        own = dict(zip(vary, values, strict=True))
        trial = _trial(make, title, fusion, modality, seed, own, len(modalities), fold)
        if trial.name in trials and not modality:  # a unimodal baseline may ignore the key in which two trials differ
            raise UserError("two trials of the plan are the same: a strategy or a value is given twice")
        trials[trial.name] = trial
    return Plan(tuple(trials.values()), code_digest())


def trial_source(source: str, fusion: str, seed: int) -> str:
    """Returns `FILE:key=value,...` with a strategy ("": the config's own) and a seed."""
    path, _, arg = source.partition(":")
    given = [item.partition("=")[0] for item in arg.split(",")]
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        if key in given:
            raise UserError(f"the ablation sets {key}; give {flag}", path="--config", value=source)
    items = [arg, f"fusion={fusion}" if fusion else "", f"seed={seed}"]
    return f"{path}:{','.join(filter(None, items))}"


def _trial(
    make: MakeConfig,
    title: str,
    fusion: str,
    modality: str,
    seed: int,
    values: dict[str, Any],
    num_modalities: int,
    fold: int | None,
) -> Trial:
    config = make(fusion, seed, modality or values.get(MODALITIES, ""))
    if fold is not None:
        set_key(config, "data.fold", fold)
    for key in sorted(values, key=lambda key: not key.endswith(".name")):  # names first, as they replace other keys
        if modality and (key.startswith(FUSION_KEYS) or not _has_key(config, key)):
            del values[key]
        elif key == OBJECTIVES:
            _add_objectives(config, values[key])
        elif key != MODALITIES:
            set_key(config, key, values[key])
    adopt(config)
    hyperparameters = {key: value for key, value in values.items() if key.startswith(SEARCH_PREFIX)}
    variation = " ".join(f"{key}={value}" for key, value in values.items() if key not in hyperparameters)
    method = " ".join(filter(None, [title, variation]))
    cell = [f"seed={seed}"] if fold is None else [f"seed={seed}", f"fold={fold}"]
    name = file_name("_".join([method, *(f"{key}={value}" for key, value in hyperparameters.items()), *cell]))
    unimodal_baseline = len(config.data.modalities) == 1 < num_modalities
    return Trial(name, method, fusion, variation, unimodal_baseline, hyperparameters, configs.to_json(config))


def code_digest(modules: Sequence[str] = ()) -> str:
    """Returns a digest of the library's source without `analysis`, or of the given modules of `analysis`."""
    root = Path(__file__).parents[2]
    analysis = root / "analysis"
    paths = [analysis / f"{name}.py" for name in modules] or set(root.rglob("*.py")) - set(analysis.rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def save(plan: Plan, directory: Path) -> Plan:
    """Writes the plan to `plan.json`; an existing plan may be extended by seeds and methods.

    Raises:
      UserError: the directory belongs to another ablation, or the code changed since the plan was made.
    """
    path = directory / PLAN
    planned = json.loads(json.dumps(dataclasses.asdict(plan)))
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, planned)
        return plan
    saved = configs.read_json(path)
    trials, saved_trials = ({trial["name"]: trial for trial in one["trials"]} for one in (planned, saved))
    for name, trial in saved_trials.items():
        if trials.get(name) != trial:
            problem = "differs from" if name in trials else "is not in"
            message = f"belongs to another ablation: its trial {name} {problem} this plan; give another --workdir"
            raise UserError(message, path=str(directory))
    if plan.code != saved["code"]:
        raise UserError(
            f"was started with other code ({saved['code']}, now {plan.code}); check out that version, or give another "
            "--workdir",
            path=str(directory),
        )
    if trials != saved_trials:
        write_json(path, planned)
    return plan


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key of a config in place; a `name` replaces the other keys of its section.

    Raises:
      UserError: the config has no such key.
    """
    section, _, last = key.rpartition(".")
    if not _has_key(config, key):
        raise UserError(f"not a key of {config.model.fusion.name}", path="--vary", value=key)
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
                message = f"the config has {name} already, for every method"
                raise UserError(message, path="--vary", value=f"{OBJECTIVES}={names}")
            if name != "none":
                config.objectives[name] = ConfigDict(configs.choice_keys(OBJECTIVES, name))


def _has_key(config: ConfigDict, key: str) -> bool:
    node = config
    for part in key.split("."):
        if not isinstance(node, ConfigDict) or part not in node:
            return False
        node = node[part]
    return True


def file_name(name: str) -> str:
    """Returns the name of the directory of a trial that is called so."""
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in name)
