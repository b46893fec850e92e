"""Builds the model that the section `model` of a config describes."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import FusionModel
from mmfusion.registry import lookup

# Fields of encoders and strategies that `build` sets from the data and the model; a config sets every other field.
ENCODER_KWARGS = frozenset(
    {"width", "dtype", "axis_name", "vocabulary", "rate", "categories", "entities", "relations", "modalities"}
)

# Keys of every encoder's section beside its name and the fields of its class.
ENCODER_KEYS = ("init", "freeze", "layer_decay", "share", "join")


def module_options(module_class: type[nn.Module]) -> dict[str, Any]:
    """Returns the fields of an encoder, strategy or objective that a config may set, with their defaults."""
    hidden = ENCODER_KWARGS | {"parent", "name"}
    return {field.name: field.default for field in dataclasses.fields(module_class) if field.name not in hidden}


def build(
    config: Mapping[str, Any],
    spec: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, int],
    *,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    frozen: Collection[str] = (),
    auxiliaries: Mapping[str, nn.Module] = flax.core.FrozenDict(),
    unimodal: str = "",
    scalars: tuple[str, ...] = (),
) -> FusionModel:
    """Returns the model that `config.model` describes.

    Args:
      config: `width`, `encoders.<modality>` = {name, **options, **ENCODER_KEYS}, `fusion` = {name, **options}.
      spec: the encoder's keyword arguments that follow from the data, per modality: {"vocabulary": ids},
        {"rate": Hz}, {"categories": (n, ...)}, {"entities": n, "relations": n} or {}.
      tasks: number of outputs per task.
      axis_name: the device axis over which batch normalisation sums; None outside pmap.
      dtype: dtype of the computation; parameters, statistics and logits are float32.
      frozen: modalities whose encoders run as in evaluation; the optimizer leaves their parameters unchanged.
      auxiliaries, unimodal, scalars: what the objectives need of the model, see `FusionModel`.

    Raises:
      UserError: there is no encoder, the data has no such modality, a name or an option is unknown, or an encoder
        needs a keyword argument that the modality does not have.
    """
    if not config["encoders"]:
        raise UserError("empty; give an encoder to at least one modality", path="config.model.encoders")
    kwargs = {"width": config["width"], "axis_name": axis_name, "dtype": dtype}
    encoders, shares, joins = {}, {}, {}
    for m, section in config["encoders"].items():
        path = f"config.model.encoders.{m}"
        if m not in spec:
            raise UserError("the data has no such modality", path=path, choices=spec)
        if section.get("share"):
            shares[m] = section["share"]
        else:
            options = {key: value for key, value in section.items() if key not in ENCODER_KEYS}
            encoders[m] = _build_module(ENCODERS, options, path, {**kwargs, **spec[m]})
        if section.get("join"):
            joins[m] = tuple(section["join"])
    fusion = _build_module(FUSIONS, config["fusion"], "config.model.fusion", kwargs)
    return FusionModel(
        encoders=flax.core.FrozenDict(encoders),
        fusion=fusion,
        tasks=tuple(sorted(tasks.items())),
        shares=flax.core.FrozenDict(shares),
        joins=flax.core.FrozenDict(joins),
        frozen=tuple(sorted(frozen)),
        auxiliaries=flax.core.FrozenDict(auxiliaries),
        unimodal=unimodal,
        scalars=scalars,
    )


def _build_module(
    registry: Mapping[str, type[nn.Module]], section: Mapping[str, Any], path: str, kwargs: Mapping[str, Any]
) -> nn.Module:
    """Returns the module that `section` = {name, **options} describes, with those `kwargs` that are fields of it."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in section.items()
    }
    name = options.pop("name")
    module_class = lookup(registry, name, f"{path}.name")
    known = module_options(module_class)
    for key in options:
        if key not in known:
            raise UserError(f"{name} has no such option", path=f"{path}.{key}", choices=known)
    needed = {field.name for field in dataclasses.fields(module_class)} & ENCODER_KWARGS
    if missing := needed - kwargs.keys():
        raise UserError(f"{name} needs {', '.join(sorted(missing))}, which this modality does not have", path=path)
    return module_class(**options, **{key: kwargs[key] for key in needed})
