"""What the flags of an ablation stand for: the config of a cell, values to try, scores of others."""

import ast
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.config import defaults
from mmfusion.errors import UserError

SHORT = {"lr": "optim.learning_rate"}


def config(source: str, overrides: Sequence[str], fusion: str, seed: int, modalities: str) -> ConfigDict:
    """Returns the config of a cell.

    Args:
      source: `FILE[:key=value,...]`.
      overrides: `--config.a.b=v`.
      fusion: the strategy; empty: the config's own.
      seed: of the run.
      modalities: `image+text`; empty: all.

    Raises:
      UserError: the source sets what the ablation does, or as of `cli.make_config`.
    """
    arg, own = _arguments(source, overrides, fusion, seed)
    made = cli.make_config(arg, own)
    defaults.keep_modalities(made, modalities)
    return made


def command(source: str, overrides: Sequence[str], cell: Cell) -> str:
    """Returns the command that trains a cell by itself, all but its `--workdir`; arguments are those of `config`."""
    arg, own = _arguments(source, overrides, cell.fusion, cell.config["seed"])
    every, kept = (set(one) for one in (cli.make_config(arg, own).data.modalities, cell.config["data"]["modalities"]))
    if kept != every:
        arg += f",modalities={'+'.join(sorted(kept))}"
        parts = [f"--config.{section}.{m}." for section in ("data.modalities", "model.encoders") for m in every - kept]
        own = [one for one in own if not one.startswith(tuple(parts))]
    if added := set(cell.config["objectives"]) - set(cli.make_config(arg, own).objectives):
        path, _, given = arg.partition(":")
        items = [item for item in given.split(",") if not item.startswith("objectives=")]
        own_objectives = [item.partition("=")[2] for item in given.split(",") if item.startswith("objectives=")]
        items.append(f"objectives={'+'.join([*filter(None, own_objectives), *sorted(added)])}")
        arg = f"{path}:{','.join(items)}"
    have, wanted = configs.flat(configs.to_json(cli.make_config(arg, own))), configs.flat(cell.config)
    differ = sorted((key for key in wanted if have.get(key) != wanted[key]), key=lambda key: not key.endswith(".name"))
    changes = [f"--config.{key}={wanted[key]}" for key in differ]
    return shlex.join(["python", "-m", "experiments.train", f"--config={arg}", *own, *changes])


def _arguments(source: str, overrides: Sequence[str], fusion: str, seed: int) -> tuple[str, list[str]]:
    """Returns `--config` and the overrides of a cell with all modalities."""
    path, _, arg = source.partition(":")
    given = [item.partition("=")[0] for item in arg.split(",")]
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        if key in given:
            raise UserError(f"--config={source}: the ablation sets {key}; give {flag}")
    more = [arg, *([f"fusion={fusion}"] if fusion else []), f"seed={seed}"]
    # A modality alone needs no fusion, and has no options of the strategies compared.
    own = overrides if fusion else [one for one in overrides if not one.startswith("--config.model.fusion.")]
    return f"{path}:{','.join(filter(None, more))}", list(own)


def values(item: str) -> tuple[str, list[Any]]:
    """Returns the config key and the values of `KEY=VALUE,VALUE`; raises UserError where it is none."""
    key, equals, listed = item.partition("=")
    if not (key and equals and listed):
        raise UserError(f"--vary={item} is not KEY=VALUE,VALUE")
    return configs.rename_key(SHORT.get(key, key)), [_literal(value) for value in listed.split(",")]


def score(item: str) -> tuple[str, float]:
    """Returns the name and the number of `NAME=SCORE`; raises UserError where it is none."""
    name, _, text = item.rpartition("=")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise UserError(f"--published={item} is not NAME=SCORE")
    return name, number


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
