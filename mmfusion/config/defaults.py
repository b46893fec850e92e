"""The default config, and what a config file is written with.

A config file defines `get_config(arg)`: it calls `begin`, sets the keys that differ from the defaults, and returns
`finish`. It may be in any folder. Every key is declared in `fields.py`; `configs/README.md` lists them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mmfusion.config.arguments import parse_arg
from mmfusion.config.choices import choice_keys, choice_options
from mmfusion.config.fields import RunConfig
from mmfusion.config.keys import key_of, section_of
from mmfusion.config.renamed import rename_keys
from mmfusion.errors import UserError
from mmfusion.objectives import objective_class

NEVER_TRAINED = 10**9  # steps of `freeze`, more than any run has


def get_config() -> ConfigDict:
    """Returns a locked config with every key at its default, without modalities, encoders, targets or objectives."""
    return _default_section(RunConfig).lock()


def modality(kind: str, feature: str, **options: Any) -> ConfigDict:
    """Returns a section of `data.modalities`.

    Args:
      kind: the type of modality: image, images, text, audio, video, table, embedding, sequence, graph or knowledge.
      feature: the dataset's feature that holds it; several joined by `+`.
      **options: options that differ from the type's defaults.

    Raises:
      UserError: an unknown type or option.
    """
    return _section({"kind": kind, "feature": feature, **choice_options("data.modalities.", kind)}, options)


def target(kind: str, feature: str, **options: Any) -> ConfigDict:
    """Returns a section of `data.targets`.

    Args:
      kind: classification, multilabel or regression.
      feature: the dataset's feature that holds the target.
      **options: options that differ from the type's defaults.

    Raises:
      UserError: an unknown type or option.
    """
    return _section({"kind": kind, "feature": feature, **choice_options("data.targets.", kind)}, options)


def encoder(modality_name: str, name: str, **options: Any) -> ConfigDict:
    """Returns a section of `model.encoders`: the encoder `name` of a modality, with options that differ."""
    return _section({"name": name, **choice_keys(f"model.encoders.{modality_name}", name)}, options)


def fusion(name: str, **options: Any) -> ConfigDict:
    """Returns the section `model.fusion`: the strategy `name`, with options that differ from its defaults."""
    return _section({"name": name, **choice_keys("model.fusion", name)}, options)


def objective(name: str, **options: Any) -> ConfigDict:
    """Returns the section `objectives.<name>`: an objective's options, with those that differ from its defaults."""
    return _section(choice_options("objectives", name), options)


def optimizer(
    name: str, learning_rate: float, *, clip_norm: float = 1.0, accumulate: int = 1,
    schedule: str = "warmup_cosine", schedule_options: Mapping[str, Any] | None = None, **options: Any,
) -> ConfigDict:  # fmt: skip
    """Returns the section `optim`.

    Args:
      name: the optimizer.
      learning_rate: peak learning rate.
      clip_norm: bound of the global gradient norm; 0: no clipping.
      accumulate: micro-batches that a batch is split into.
      schedule: the learning-rate schedule.
      schedule_options: its options that differ from its defaults.
      **options: the optimizer's options that differ from its defaults.

    Raises:
      UserError: an unknown name or option.
    """
    declared = {"name": name, "learning_rate": learning_rate, "clip_norm": clip_norm, "accumulate": accumulate}
    result = _section({**declared, **choice_options("optim", name)}, options)
    schedule_section = {"name": schedule, **choice_options("optim.schedule", schedule)}
    result.schedule = _section(schedule_section, schedule_options or {})
    return result


def begin(arg: str, fusion_name: str = "concat", **own: Any) -> tuple[ConfigDict, ConfigDict]:
    """Begins a config: the defaults with the seed and strategy of the arguments.

    Every config takes the arguments `seed`; `fusion`, a strategy; `modalities`, those to keep (`image+text`; empty:
    all); `objectives`, added with their defaults (`contrastive+mvae`); and `encoders`, a folder that has a run of each
    modality alone, named like it, whose trained encoders are used and not trained further.

    Args:
      arg: what follows the colon of `--config=FILE:key=value,key=value`.
      fusion_name: the strategy where the arguments name none.
      **own: further arguments of this config, with their defaults.

    Returns:
      An unlocked config, and the values of all arguments, for `finish`.

    Raises:
      UserError: an unknown argument, or a value of another type than the argument's default.
    """
    common = {"fusion": fusion_name, "seed": 0, "modalities": "", "objectives": "", "encoders": ""}
    args = parse_arg(arg, **{**common, **own})
    config = get_config().unlock()
    config.seed = args.seed
    config.model.fusion = fusion(args.fusion)
    return config, args


def finish(config: ConfigDict, args: ConfigDict) -> ConfigDict:
    """Finishes a config: applies the arguments `modalities`, `objectives` and `encoders` of `begin`, and locks it."""
    rename_keys(config)
    keep_modalities(config, args.modalities)
    add_objectives(config, args.objectives)
    if args.modalities:
        for name, section in list(config.objectives.items()):
            if objective_class(name, section).requires.modalities > len(config.model.encoders):
                del config.objectives[name]
    if args.encoders:
        for name, section in config.model.encoders.items():
            if not section.share:
                section.init, section.freeze = f"run:{args.encoders}/{name}", NEVER_TRAINED
    return config.lock()


def keep_modalities(config: ConfigDict, names: str) -> None:
    """Keeps the modalities in `names` (`image+text`; empty: all), in place.

    An encoder of several modalities, joined or shared, stays as long as one of them does.

    Raises:
      UserError: a modality that the config does not have.
    """
    if not names:
        return
    kept = names.split("+")
    for name in kept:
        if name not in config.data.modalities:
            raise UserError(
                "unknown modality", path="config argument modalities", value=name, choices=config.data.modalities
            )
    with config.unlocked():
        for name in [m for m in config.data.modalities if m not in kept]:
            del config.data.modalities[name]
        config.data.missing_in = "+".join(m for m in config.data.missing_in.split("+") if m in kept)
        encoders = {name: section.copy_and_resolve_references() for name, section in config.model.encoders.items()}
        config.model.encoders = ConfigDict()
        owner = {}  # encoder -> the modality whose section it is now
        for name, section in encoders.items():
            left = [m for m in (name, *section.join) if m in kept]
            left += [m for m, other in encoders.items() if other.share == name and m in kept]
            if left and not section.share:
                section.join = tuple(m for m in left[1:] if m in section.join)
                config.model.encoders[left[0]] = section
                owner[name] = left[0]
        for name, section in encoders.items():
            if section.share and name in kept and owner[section.share] != name:
                section.share = owner[section.share]
                config.model.encoders[name] = section


def add_tasks(config: ConfigDict, names: str) -> None:
    """Adds a classification target for each feature in `names` (`label+shown`); the first one's accuracy selects.

    Raises:
      UserError: a feature that is named twice.
    """
    tasks = names.split("+")
    if len(set(tasks)) < len(tasks):
        raise UserError("names a task twice", path="config argument tasks", value=names)
    for task in tasks:
        config.data.targets[task] = target("classification", task)
    config.select = "accuracy" if len(tasks) == 1 else f"{tasks[0]}/accuracy"


def add_objectives(config: ConfigDict, names: str) -> None:
    """Adds the objectives in `names` (`contrastive+mvae`; empty: none), with their defaults, in place."""
    with config.unlocked():
        for name in filter(None, names.split("+")):
            config.objectives[name.rpartition(":")[2].lower()] = objective(name)  # package.module:Class -> class


def _default_section(cls: type, path: str = "") -> ConfigDict:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if key_of(field):
            values[field.name] = field.default
        elif inner := section_of(field):
            values[field.name] = _default_section(inner, f"{path}{field.name}.")
        elif field.metadata.get("options"):
            values |= choice_options(path.rstrip("."), values["name"])
        else:
            values[field.name] = ConfigDict()
    return ConfigDict(values)


def _section(defaults: Mapping[str, Any], changes: Mapping[str, Any]) -> ConfigDict:
    for key in changes:
        if key not in defaults:
            owner = defaults.get("name") or defaults.get("kind") or "the objective"
            raise UserError(f"{owner} has no such option", path=f"option {key}", choices=defaults)
    return ConfigDict({**defaults, **changes})
