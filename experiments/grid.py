"""What the flags of an ablation stand for: the config of a cell, values to try, scores of others."""

import ast
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import base
from experiments import cli
from mmfusion import config as configs
from mmfusion.analysis.plan import Cell
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
    path, _, arg = source.partition(":")
    given = [item.partition("=")[0] for item in arg.split(",")]
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        if key in given:
            raise UserError(f"--config={source}: the ablation sets {key}; give {flag}")
    more = [f"seed={seed}", *([f"fusion={fusion}"] if fusion else [])]
    # A modality alone needs no fusion, and has no options of the strategies compared.
    own = overrides if fusion else [one for one in overrides if not one.startswith("--config.model.fusion.")]
    made = cli.make_config(f"{path}:{','.join(filter(None, [arg, *more]))}", own)
    base.keep_modalities(made, modalities)
    return made


def command(source: str, overrides: Sequence[str], cell: Cell) -> str:
    """Returns the command that trains a cell by itself, all but its `--workdir`; arguments are those of `config`."""
    modalities = "+".join(cell.config["data"]["modalities"])
    made = config(source, overrides, cell.fusion, cell.config["seed"], modalities)
    path, _, arg = source.partition(":")
    more = [arg, f"fusion={cell.fusion}" * bool(cell.fusion), f"seed={cell.config['seed']}"]
    if len(cell.config["data"]["modalities"]) < len(config(source, overrides, cell.fusion, 0, "").data.modalities):
        more.append(f"modalities={modalities}")
    own = overrides if cell.fusion else [one for one in overrides if not one.startswith("--config.model.fusion.")]
    have, wanted = configs.flat(configs.to_json(made)), configs.flat(cell.config)
    differ = sorted((key for key in wanted if have.get(key) != wanted[key]), key=lambda key: not key.endswith(".name"))
    changes = [f"--config.{key}={wanted[key]}" for key in differ]
    given = [f"--config={path}:{','.join(filter(None, more))}", *own, *changes]
    return shlex.join(["python", "-m", "experiments.train", *given])


def values(item: str) -> tuple[str, list[Any]]:
    """Returns the config key and the values of `KEY=VALUE,VALUE`; raises UserError where it is none."""
    key, equals, listed = item.partition("=")
    if not (key and equals and listed):
        raise UserError(f"--vary={item} is not KEY=VALUE,VALUE")
    return SHORT.get(key, key), [_literal(value) for value in listed.split(",")]


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
