"""The search space of `--tune`, and the settings that every method is tuned with.

All methods get the same settings: the first N points of a scrambled Halton sequence (Owen 2017, arXiv:1706.02808),
which cover each key evenly for any N.
"""

import ast
import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import qmc

from mmfusion import config as configs
from mmfusion.errors import UserError

SEED = 0  # of the sequence
DIGITS = 3  # significant digits of a value
NONE = "none"  # removes a key from the space
SPACE = {  # a key with * is every key of the config that it matches, all of one value; --space adds to it or replaces
    "optim.learning_rate": "3e-4..1e-2:log",
    "optim.weight_decay": "1e-5..1e-1:log",
    "model.*.dropout": "0..0.5",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, evenly or, with `log`, evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}{' (log)' if self.log else ''}"

    def at(self, u: float) -> float:
        """Returns the value at `u` in [0, 1), to a few significant digits."""
        value = self.low + u * (self.high - self.low)
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        return float(f"{value:.{DIGITS}g}")


@dataclasses.dataclass(frozen=True)
class Values:
    """A list of values, each as likely as the others."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in self.values)

    def at(self, u: float) -> Any:
        """Returns the value at `u` in [0, 1)."""
        return self.values[int(u * len(self.values))]


Space = Mapping[str, Range | Values]  # by config key, or a pattern of keys


def space(changes: Mapping[str, str]) -> Space:
    """Returns the search space: SPACE with the changes.

    Args:
      changes: config key, or pattern of keys -> `LOW..HIGH`, `LOW..HIGH:log`, `A,B,C` or `none`.

    Raises:
      UserError: a range or list cannot be read, or no key is left.
    """
    declared = {key: text for key, text in {**SPACE, **changes}.items() if text != NONE}
    if not declared:
        raise UserError("leaves no key to tune", path="--space", value=",".join(changes))
    return {key: _dimension(key, text) for key, text in declared.items()}


def _dimension(key: str, text: str) -> Range | Values:
    low, dots, rest = text.partition("..")
    if not dots:
        return Values(tuple(_literal(value) for value in text.split(",")))
    high, colon, scale = rest.partition(":")
    try:
        found = Range(float(low), float(high), log=scale == "log")
    except ValueError:
        found = Range(math.nan, math.nan)
    valid = found.low < found.high < math.inf and found.low > (0 if found.log else -math.inf)
    if not valid or (colon and not found.log):
        message = "must be LOW..HIGH, or LOW..HIGH:log above 0, or A,B,C, or none"
        raise UserError(message, path="--space", value=f"{key}={text}")
    return found


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def settings(declared: Space, count: int) -> list[dict[str, Any]]:
    """Returns the values by key of `count` settings; a larger count adds to those of a smaller one."""
    points = qmc.Halton(len(declared), rng=SEED).random(count)
    return [{key: found.at(u) for (key, found), u in zip(declared.items(), point, strict=True)} for point in points]


def matching(config: Mapping[str, Any], key: str) -> list[str]:
    """Returns the keys of a config, given as JSON values, that a key of the space stands for."""
    return [name for name in configs.flat(config) if fnmatch.fnmatchcase(name, key)]


def overlap(declared: Space, keys: Sequence[str]) -> str:
    """Returns the first of some config keys that the space has, too; "" if there is none."""
    return next((key for key in keys for pattern in declared if fnmatch.fnmatchcase(key, pattern)), "")
