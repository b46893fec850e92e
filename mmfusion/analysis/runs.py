"""Finished runs side by side: which configs differ in what, and their test scores over seeds."""

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
from mmfusion.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, its config, and what `result.json` holds."""

    directory: epath.Path
    config: ConfigDict
    result: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """Runs of one config over seeds, named by what sets it apart from the other methods."""

    name: str
    runs: tuple[Run, ...]

    def scores(self, split: str, metric: str) -> list[float]:
        """Returns a metric of each run, in the order of the seeds; NaN where it is undefined.

        Raises:
          UserError: the runs have no such metric.
        """
        have = configs.selectable(self.runs[0].config)
        if metric not in have:
            raise UserError(f"{self.runs[0].directory} has no metric {metric!r}: {nearest(metric, have)}")
        values = [run.result[split][metric] for run in self.runs]
        return [float("nan") if value is None else value for value in values]


def read(directory: epath.PathLike) -> Run:
    """Returns a finished run.

    Raises:
      UserError: the directory holds none.
    """
    directory = epath.Path(directory)
    for name in ("config.json", "result.json"):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no finished run: {name} is missing")
    config, result = (configs.read_json(directory / name) for name in ("config.json", "result.json"))
    return Run(directory, configs.from_json(config), result)


def methods(runs: Sequence[Run]) -> list[Method]:
    """Returns the runs grouped by config, whatever their seed, each group named by the choices that others lack.

    Raises:
      UserError: two runs are of one config and seed.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_apart_from_seed(run), sort_keys=True), []).append(run)
    for group in groups.values():
        group.sort(key=lambda run: run.config.seed)
        for one, other in itertools.pairwise(group):
            if one.config.seed == other.config.seed:
                raise UserError(f"{one.directory} and {other.directory} are the same config and seed")
    each = [_apart_from_seed(group[0]) for group in groups.values()]
    return [Method(_name(one, each), tuple(group)) for one, group in zip(each, groups.values(), strict=True)]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean, and the standard deviation of a sample (n - 1), None of a single or an undefined value."""
    mean = statistics.fmean(values)
    return mean, None if len(values) < 2 or math.isnan(mean) else statistics.stdev(values)


def _apart_from_seed(run: Run) -> dict[str, Any]:
    flat = configs.flat(configs.to_json(run.config))
    return {key: value for key, value in flat.items() if key not in ("seed", *configs.RESOURCE_KEYS)}


def _name(one: dict[str, Any], each: Sequence[dict[str, Any]]) -> str:
    """Returns what is chosen otherwise elsewhere, and the keys that tell it from configs of the same choices."""
    apart = [key for key in one if key.endswith(".name") and any(other.get(key) != one[key] for other in each)]
    alike = [other for other in each if all(other.get(key) == one[key] for key in apart)]
    more = [key for key in one if any(other.get(key) != one[key] for other in alike)]
    return " ".join([*(str(one[key]) for key in apart), *(f"{key}={one[key]}" for key in more)]) or "one config"
