"""Equal tuning: every method is trained with the same settings, and its best one on validation runs with fresh seeds.

The trials of the search are a plan of its own in `tuning/`, below the ablation's directory; only their validation
scores are read. `tuning.json` records the search space, and then what was chosen.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfusion import config as configs
from mmfusion.analysis.ablation import search_space
from mmfusion.analysis.ablation.plan import PLAN, SEARCH_PREFIX, MakeConfig, Plan, Trial, build, file_name, set_key
from mmfusion.analysis.ablation.search_space import Space, Values
from mmfusion.errors import UserError
from mmfusion.files import to_builtin, write_json

FOLDER, RECORD = "tuning", "tuning.json"
FIRST_SEED = 1_000  # of the search; an ablation's own seeds are below it


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The setting that validation chose for a method.

    Attributes:
      values: by key of the space, and the values of `--vary` that were searched with it; empty if every setting failed.
      valid: the mean validation score over the seeds of the search; None if every setting failed.
      settings: the number of settings that were tried.
      failed: the number of those that failed, or had an undefined score, with a seed.
    """

    values: dict[str, Any]
    valid: float | None
    settings: int
    failed: int


@dataclasses.dataclass(frozen=True)
class Search:
    """The search of an ablation.

    Attributes:
      plan: its trials.
      space: what was tuned: what the settings were drawn from, and the values of `--vary` that they were crossed with.
      settings: the values by key of each setting.
      seeds: with which each setting is trained.
      metric: the validation metric to choose by.
    """

    plan: Plan
    space: Space
    settings: tuple[dict[str, Any], ...]
    seeds: tuple[int, ...]
    metric: str

    @property
    def methods(self) -> list[str]:
        """The methods in the plan's order."""
        return list(dict.fromkeys(trial.method for trial in self.plan.trials))

    def record(self) -> dict[str, Any]:
        """Returns what `tuning.json` says before the search."""
        return {
            "trials": len(self.settings),
            "space": {key: str(found) for key, found in self.space.items()},
            "seeds": list(self.seeds),
            "metric": self.metric,
            "settings": list(self.settings),
        }


def plan_search(
    make: MakeConfig,
    fusions: Sequence[str],
    vary: Mapping[str, Sequence[Any]],
    count: int,
    seeds: int,
    changes: Mapping[str, str],
    metric: str,
) -> Search:
    """Returns the search: every method of an ablation with every setting and seed.

    A key that a method does not have is ignored, and settings that differ in such keys only are tried once.

    Args:
      make, fusions, vary: see `plan.build`; values of the optimizer in `vary` are crossed with the settings.
      count: the number of settings.
      seeds: the number of seeds of each.
      changes: see `search_space.space`.
      metric: the validation metric to choose by.

    Raises:
      UserError: see `plan.build` and `search_space.space`; a key is varied and tuned, or no method has it.
    """
    space = search_space.space(changes)
    if key := search_space.overlap(space, list(vary)):
        message = "is tuned by --tune; leave it out, or take it out of the search space with --space=KEY=none"
        raise UserError(message, path="--vary", value=key)
    drawn = search_space.settings(space, count)
    planned = build(make, fusions, seeds, vary, first_seed=FIRST_SEED)
    by_cell: dict[tuple[int, str], dict[str, Trial]] = {}  # (seed, method) -> hyperparameters -> trial
    for trial in planned.trials:
        found = by_cell.setdefault((trial.config["seed"], trial.method), {})
        for setting in drawn:
            own = {key: value for key, value in setting.items() if search_space.matching(trial.config, key)}
            values = {**trial.hyperparameters, **own}
            found.setdefault(repr(values), with_values(trial, values, f"setting={len(found)}"))
    trials = tuple(trial for found in by_cell.values() for trial in found.values())
    for key in changes:
        if key in space and not any(key in trial.hyperparameters for trial in trials):
            raise UserError("no method has such a key", path="--space", value=key)
    seeds_used = tuple(range(FIRST_SEED, FIRST_SEED + seeds))
    crossed = {key: Values(tuple(each)) for key, each in vary.items() if key.startswith(SEARCH_PREFIX)}
    return Search(Plan(trials, planned.code), {**space, **crossed}, tuple(drawn), seeds_used, metric)


def with_values(trial: Trial, values: Mapping[str, Any], label: str = "") -> Trial:
    """Returns the trial with other hyperparameters.

    Args:
      trial: the trial.
      values: by config key, or by pattern for every key that it matches.
      label: distinguishes its name from those of other settings.
    """
    config = configs.from_json(trial.config)
    for key in sorted(values, key=lambda key: not key.endswith(".name")):  # names first, as they replace other keys
        for name in search_space.matching(configs.to_json(config), key):
            set_key(config, name, values[key])
    name = file_name("_".join(filter(None, [trial.method, label, f"seed={trial.config['seed']}"])))
    return dataclasses.replace(trial, name=name, hyperparameters=dict(values), config=configs.to_json(config))


def start(directory: Path, search: Search | None) -> None:
    """Records the search in an ablation's directory, and refuses a directory with another one, or without one.

    Raises:
      UserError: the directory has trials that were tuned in another way.
    """
    path = directory / RECORD
    if not path.exists():
        if search and (directory / PLAN).exists():
            raise UserError("was started without --tune; give another --workdir", path=str(directory))
        if search:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, to_builtin(search.record() | {"chosen": {}}))
        return
    recorded = configs.read_json(path)
    if search is None:
        message = f"was tuned with --tune={recorded['trials']}; give it again, or another --workdir"
        raise UserError(message, path=str(directory))
    now = json.loads(json.dumps(to_builtin(search.record())))
    for key, value in now.items():
        if recorded[key] != value:
            message = f"was tuned with {key} {recorded[key]}, and now {value}; give another --workdir"
            raise UserError(message, path=str(directory))


def chosen(directory: Path) -> dict[str, Chosen]:
    """Returns what was chosen for each method so far."""
    path = directory / RECORD
    return {name: Chosen(**each) for name, each in configs.read_json(path)["chosen"].items()} if path.exists() else {}


def choose(search: Search, directory: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Chosen]:
    """Chooses the setting of each method that has none yet, and records it: a later run of a failed trial changes none.

    Args:
      search: the search, all of whose trials have ended.
      directory: the ablation's directory.
      results: trial name -> its `result.json`; failed trials are missing.
    """
    found = chosen(directory)
    for method in search.methods:
        if method not in found:
            trials = [trial for trial in search.plan.trials if trial.method == method]
            found[method] = _best(trials, results, search.metric)
    record = search.record() | {"chosen": {name: dataclasses.asdict(each) for name, each in found.items()}}
    write_json(directory / RECORD, to_builtin(record))
    return found


def _best(trials: Sequence[Trial], results: Mapping[str, Mapping[str, Any]], metric: str) -> Chosen:
    """Returns the setting with the best mean validation score, the first of equal ones.

    A setting that failed with one of its seeds, or whose score is undefined there, has no score.
    """
    by_setting: dict[str, list[Trial]] = {}
    for trial in trials:
        by_setting.setdefault(repr(trial.hyperparameters), []).append(trial)
    sign = 1 if configs.selectable(configs.from_json(trials[0].config))[metric] else -1
    means: list[tuple[float, dict[str, Any]]] = []
    for same in by_setting.values():
        scores = [results.get(trial.name, {}).get("valid", {}).get(metric) for trial in same]
        defined = [score for score in scores if score is not None and math.isfinite(score)]
        if len(defined) == len(scores):
            means.append((statistics.fmean(defined), same[0].hyperparameters))
    failed = len(by_setting) - len(means)
    if not means:
        return Chosen({}, None, len(by_setting), failed)
    valid, values = max(means, key=lambda pair: sign * pair[0])
    return Chosen(values, valid, len(by_setting), failed)


def tuned_plan(plan: Plan, found: Mapping[str, Chosen]) -> Plan:
    """Returns a plan with the chosen setting of every method.

    A method all of whose settings failed keeps its config's own values, so that no unimodal baseline is missing.
    """
    trials: dict[str, Trial] = {}
    for trial in plan.trials:
        tuned = with_values(trial, found[trial.method].values)
        trials.setdefault(tuned.name, tuned)  # of the varied values of the optimizer one is chosen by now
    return dataclasses.replace(plan, trials=tuple(trials.values()))


def untuned(found: Mapping[str, Chosen], methods: Collection[str]) -> list[str]:
    """Returns the methods all of whose settings failed."""
    return [method for method in methods if method in found and found[method].valid is None]
