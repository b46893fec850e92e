"""Parses the flags of an ablation: the config of a trial, the values of a key, published scores."""

import ast
import math
import shlex
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Trial, trial_source
from mmfusion.config import defaults
from mmfusion.errors import UserError

SHORT = {"lr": "optim.learning_rate"}


def config(source: str, overrides: Sequence[str], fusion: str, seed: int, modalities: str) -> ConfigDict:
    """Returns the config of a trial.

    Args:
      source: `FILE[:key=value,...]`.
      overrides: `--config.a.b=v`.
      fusion: the strategy; "": the config's own.
      seed: the seed.
      modalities: `image+text`; "": all.

    Raises:
      UserError: the source sets the strategy or the seed, or see `cli.make_config`.
    """
    arg, own = _arguments(source, overrides, fusion, seed)
    result = cli.make_config(arg, own)
    defaults.keep_modalities(result, modalities)
    return result


def command(source: str, overrides: Sequence[str], trial: Trial) -> str:
    """Returns the command that trains a trial, without its `--workdir`; for arguments see `config`."""
    arg, own = _arguments(source, overrides, trial.fusion, trial.config["seed"])
    kept = set(trial.config["data"]["modalities"])
    dropped = set(cli.make_config(arg, own).data.modalities) - kept
    if dropped:
        arg += f",modalities={'+'.join(sorted(kept))}"
        sections = [f"--config.{path}.{m}." for path in ("data.modalities", "model.encoders") for m in dropped]
        own = [item for item in own if not item.startswith(tuple(sections))]
    if added := set(trial.config["objectives"]) - set(cli.make_config(arg, own).objectives):
        path, _, given = arg.partition(":")
        items = [item for item in given.split(",") if not item.startswith("objectives=")]
        own_objectives = [item.partition("=")[2] for item in given.split(",") if item.startswith("objectives=")]
        items.append(f"objectives={'+'.join([*filter(None, own_objectives), *sorted(added)])}")
        arg = f"{path}:{','.join(items)}"
    current, wanted = configs.flat(configs.to_json(cli.make_config(arg, own))), configs.flat(trial.config)
    differing = [key for key in wanted if current.get(key) != wanted[key]]
    differing.sort(key=lambda key: not key.endswith(".name"))  # a name replaces its section's options
    changes = [f"--config.{key}={wanted[key]}" for key in differing]
    return shlex.join(["python", "-m", "experiments.train", f"--config={arg}", *own, *changes])


def _arguments(source: str, overrides: Sequence[str], fusion: str, seed: int) -> tuple[str, list[str]]:
    """Returns `--config` and the overrides of a trial with all modalities."""
    # The options of the compared strategies do not apply to a unimodal baseline.
    own = overrides if fusion else [item for item in overrides if not item.startswith("--config.model.fusion.")]
    return trial_source(source, fusion, seed), list(own)


def values(item: str) -> tuple[str, list[Any]]:
    """Returns the config key and the values of `KEY=VALUE,VALUE`; raises UserError for another format."""
    key, equals, listed = item.partition("=")
    if not (key and equals and listed):
        raise UserError("must be KEY=VALUE,VALUE", path="--vary", value=item)
    return configs.rename_key(SHORT.get(key, key)), [_literal(value) for value in listed.split(",")]


def dimension(item: str) -> tuple[str, str]:
    """Returns the config key and what it is tuned over, of `KEY=TEXT`; raises UserError for another format."""
    key, _, text = item.partition("=")
    if not (key and text):
        raise UserError("must be KEY=LOW..HIGH[:log], KEY=A,B,C or KEY=none", path="--space", value=item)
    return configs.rename_key(SHORT.get(key, key)), text


def score(item: str) -> tuple[str, float]:
    """Returns the name and the score of `NAME=SCORE`; raises UserError for another format."""
    name, _, text = item.rpartition("=")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not name or not math.isfinite(number):
        raise UserError("must be NAME=SCORE", path="--published", value=item)
    return name, number


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def resources(text: str) -> dict[str, float]:
    """Returns the amounts by name of `NAME=AMOUNT,NAME=AMOUNT`; raises UserError for another format."""
    found = {}
    for item in filter(None, text.split(",")):
        name, _, amount = item.partition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = math.nan
        if not name or not 0 <= found[name] < math.inf or (found[name] > 1 and found[name] % 1):
            raise UserError(
                "must be NAME=AMOUNT, a whole number or a share of one, such as GPU=0.5", path="--resources", value=item
            )
    return found
