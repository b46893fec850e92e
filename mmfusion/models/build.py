"""Builds the model described by the `model` section of a config."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.encoders.images import PerImage
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import FusionModel
from mmfusion.registry import lookup

# Fields that `build` sets from the data and the model; a config sets every other field of encoders and strategies.
ENCODER_KWARGS = frozenset(
    {"width", "dtype", "axis_name", "vocabulary", "rate", "categories", "entities", "relations", "modalities"}
)

# Keys of every encoder's section besides its name and the fields of its class.
ENCODER_KEYS = ("init", "freeze", "layer_decay", "share", "join")


def module_options(module_class: type[nn.Module]) -> dict[str, Any]:
    """Returns the config options of an encoder, strategy or objective class, with their defaults."""
    reserved = ENCODER_KWARGS | {"parent", "name"}
    return {field.name: field.default for field in dataclasses.fields(module_class) if field.name not in reserved}


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
    """Returns the model described by `config.model`.

    Args:
      config: `width`, `encoders.<modality>` = {name, **options, **ENCODER_KEYS}, `fusion` = {name, **options}.
      spec: per modality, the encoder's keyword arguments that depend on the data: {"vocabulary": ids}, {"rate": Hz},
        {"categories": (n, ...)}, {"entities": n, "relations": n} or {}. {"pool": ...} is that of `PerImage`, which then
        applies an image encoder to each of several images.
      tasks: number of outputs per task.
      axis_name: the device axis over which batch normalisation sums its statistics; None outside pmap.
      dtype: dtype of the computation; parameters, batch statistics and logits are float32.
      frozen: modalities whose encoders run in evaluation mode; the optimizer does not update their parameters.
      auxiliaries, unimodal, scalars: the objectives' requirements, see `FusionModel`.

    Raises:
      UserError: `encoders` is empty, the data lacks a modality, a name or an option is unknown, or an encoder requires
        a keyword argument that the modality does not provide.
    """
    if not config["encoders"]:
        raise UserError("empty; give an encoder to at least one modality", path="config.model.encoders")
    kwargs = {"width": config["width"], "axis_name": axis_name, "dtype": dtype}
    encoders, shares, joins = {}, {}, {}
    for modality, section in config["encoders"].items():
        path = f"config.model.encoders.{modality}"
        if modality not in spec:
            raise UserError("the data has no such modality", path=path, choices=spec)
        if section.get("share"):
            shares[modality] = section["share"]
        else:
            options = {key: value for key, value in section.items() if key not in ENCODER_KEYS}
            encoder: Any = _build_module(ENCODERS, options, path, {**kwargs, **spec[modality]})
            if "pool" in spec[modality] and encoder.reads == "image":
                encoder = PerImage(encoder, spec[modality]["pool"], dtype)
            encoders[modality] = encoder
        if section.get("join"):
            joins[modality] = tuple(section["join"])
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
    """Returns the module described by `section` = {name, **options}, given those of `kwargs` that are its fields."""
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in section.items()
    }
    name = options.pop("name")
    module_class = lookup(registry, name, f"{path}.name")
    choices = module_options(module_class)
    for key in options:
        if key not in choices:
            raise UserError(f"{name} has no such option", path=f"{path}.{key}", choices=choices)
    required = {field.name for field in dataclasses.fields(module_class)} & ENCODER_KWARGS
    if missing := required - kwargs.keys():
        raise UserError(f"{name} needs {', '.join(sorted(missing))}, which this modality does not have", path=path)
    return module_class(**options, **{key: kwargs[key] for key in required})
