"""Comparison of finished runs: the keys in which their configs differ, and their scores over seeds."""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.data import trust
from mmfusion.errors import UserError
from mmfusion.training import seal


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config, and the content of `result.json`."""

    directory: epath.Path
    config: ConfigDict
    result: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """Runs of one config over seeds, named by the config keys that differ from the other methods."""

    name: str
    runs: tuple[Run, ...]

    def scores(self, split: str, metric: str) -> list[float]:
        """Returns a metric of each run, ordered by seed; NaN where it is undefined.

        Raises:
          UserError: the runs have no such metric.
        """
        have = configs.selectable(self.runs[0].config)
        if metric not in have:
            raise UserError(f"{self.runs[0].directory} has no such metric", path="--metric", value=metric, choices=have)
        values = [run.result[split][metric] for run in self.runs]
        return [float("nan") if value is None else value for value in values]


def read(directory: epath.PathLike) -> Run:
    """Returns a finished run.

    Raises:
      UserError: the directory has no finished run, or its config is damaged or not that of its result.
    """
    directory = epath.Path(directory)
    for name in ("config.json", "result.json"):
        if not (directory / name).is_file():
            raise UserError(f"has no finished run: {name} is missing", path=str(directory))
    values = seal.read_config(directory, directory / "checkpoints")
    result = configs.read_json(directory / "result.json")
    seal.check_config(values, str(directory / seal.FILE), result.get("config", values), "result.json")
    return Run(directory, configs.from_json(trust.checked(values, directory / seal.FILE)), result)


def methods(runs: Sequence[Run]) -> list[Method]:
    """Returns the runs grouped by config without the seed, each group named by the keys in which it differs.

    Raises:
      UserError: two runs have the same config and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_without_seed(run), sort_keys=True), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.config.seed)
        for one, other in itertools.pairwise(group):
            if one.config.seed == other.config.seed:
                raise UserError(f"has the same config and seed as {one.directory}", path=str(other.directory))
    flat = [_without_seed(group[0]) for group in groups.values()]
    return [Method(_name(config, flat), tuple(group)) for config, group in zip(flat, groups.values(), strict=True)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation (n - 1), None for a single value or an undefined mean."""
    mean = statistics.fmean(values)
    return mean, None if len(values) < 2 or math.isnan(mean) else statistics.stdev(values)


def _without_seed(run: Run) -> dict[str, Any]:
    flat = configs.flat(configs.to_json(run.config))
    return {key: value for key, value in flat.items() if key not in ("seed", *configs.RESOURCE_KEYS)}


def _name(config: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """Returns the choices that differ among the configs, and the keys that differ among configs of the same choices."""
    choices = [key for key in config if key.endswith(".name") and any(o.get(key) != config[key] for o in others)]
    same_choices = [other for other in others if all(other.get(key) == config[key] for key in choices)]
    keys = [key for key in config if any(other.get(key) != config[key] for other in same_choices)]
    return " ".join([*(str(config[key]) for key in choices), *(f"{key}={config[key]}" for key in keys)]) or "one config"
