"""Checks what a config says of its data, and which encoder reads what."""

import re
from collections.abc import Iterable

from ml_collections import ConfigDict

from mmfusion.config.checks import check_exact, check_member, check_positive
from mmfusion.data import sources
from mmfusion.data.decoding import TARGET_OPTIONS
from mmfusion.data.modalities import EDGES, MODALITY_TYPES, feature_names
from mmfusion.data.text import FILES, TOKENIZERS
from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import LOSSES
from mmfusion.registry import lookup

RESERVED = ("bias", "joint", "learned", "self")  # names that strategies give to what is no modality


def check_data(config: ConfigDict) -> None:
    """Raises UserError where modalities, targets and encoders are not right, or not right for each other."""
    data = config.data
    for name in filter(None, (data.name, data.fallback_name)):
        sources.check_name(name, data.dir)
    if not data.modalities:
        raise UserError("config.data.modalities is empty: a model needs at least one modality")
    if not data.targets:
        raise UserError("config.data.targets is empty: a model needs at least one target")
    joined = {other: m for m, options in config.model.encoders.items() for other in options.join}
    if set(data.modalities) != {*config.model.encoders, *joined}:
        raise UserError(
            f"config.data.modalities has {', '.join(sorted(data.modalities))}, config.model.encoders has "
            f"{', '.join(sorted({*config.model.encoders, *joined}))}: they must be the same"
        )
    for m, options in config.model.encoders.items():
        _check_together(config, m, options.join, f"model.encoders.{m}.join")
        _check_together(config, m, filter(None, [options.share]), f"model.encoders.{m}.share")
        if joined.keys() & {m}:
            raise UserError(f"config.model.encoders.{m} is read by the encoder of {joined[m]}: leave it out here")
        if options.share and (shared := config.model.encoders[options.share]) and shared.share:
            raise UserError(
                f"config.model.encoders.{m}.share={options.share!r} shares another's: name {shared.share!r}"
            )
        if options.share and (options.init or options.freeze or options.layer_decay != 1):
            raise UserError(
                f"config.model.encoders.{m} has {options.share}'s weights: set init, freeze and layer_decay there"
            )
        if not 0 < options.layer_decay <= 1:
            raise UserError(
                f"config.model.encoders.{m}.layer_decay={options.layer_decay} must be above 0 and at most 1"
            )
        if options.layer_decay != 1:
            encoder_class = lookup(ENCODERS, options.name, f"config.model.encoders.{m}.name")
            if getattr(encoder_class, "layer_order", None) is None:
                path = f"config.model.encoders.{m}.layer_decay"
                raise UserError(f"the layers of {options.name} are not sequential; set it to 1", path=path)
    for section, table in (
        ("modalities", {k: v.options for k, v in MODALITY_TYPES.items()}),
        ("targets", TARGET_OPTIONS),
    ):
        for name, options in data[section].items():
            path = f"data.{section}.{name}"
            check_member(options.get("kind", ""), table, f"{path}.kind")
            expected = table[options.kind]
            check_exact(options, {"kind": "", "feature": "", **expected}, path, expected)
    for name, options in data.modalities.items():
        path = f"data.modalities.{name}"
        if not re.fullmatch("[a-z][a-z0-9]*", name) or name in RESERVED:
            raise UserError(
                f"config.{path}: a modality's name is small letters and digits, none of {', '.join(RESERVED)}"
            )
        encoder = config.model.encoders.get(name)
        if encoder is not None:
            encoder_path = f"config.model.encoders.{name}.name"
            if lookup(ENCODERS, encoder.name, encoder_path).reads != options.kind:
                fitting = [key for key, encoder_class in ENCODERS.items() if encoder_class.reads == options.kind]
                message = f"does not read {options.kind}; choose one of {', '.join(fitting)}"
                raise UserError(message, path=encoder_path, value=encoder.name)
        if options.kind == "text":
            published = options.tokenizer.endswith(FILES)
            if not published:
                check_member(options.tokenizer, TOKENIZERS, f"{path}.tokenizer")
                smallest = TOKENIZERS[options.tokenizer][1]
                if options.vocabulary_size < smallest:
                    raise UserError(f"config.{path}.vocabulary_size must be at least {smallest}")
            elif options.augment.drop:
                raise UserError(f"config.{path}.augment.drop is for our own tokenizers, whose unknown word it knows")
            check_positive(options.length, f"{path}.length")
        if options.kind == "audio":
            check_positive(options.rate, f"{path}.rate")
            check_positive(options.seconds, f"{path}.seconds")
        if options.kind in ("image", "video"):
            if len(options.size) != 2 or min(options.size) < 1 or options.channels not in (1, 2, 3, 4):
                raise UserError(f"config.{path} must have size=(H, W) in pixels and 1 to 4 channels")
            if len(options.mean) not in (1, options.channels) or len(options.std) not in (1, options.channels):
                raise UserError(f"config.{path}.mean and .std must have 1 or {options.channels} numbers")
            if min(options.std) <= 0:
                raise UserError(f"config.{path}.std must be above 0, got {tuple(options.std)}")
        if options.kind == "video":
            check_positive(options.frames, f"{path}.frames")
        if options.kind == "table":
            for column in options.categorical:
                check_member(column, feature_names(options), f"{path}.categorical")
        if options.kind == "graph":
            check_positive(options.nodes, f"{path}.nodes")
            check_positive(options.features, f"{path}.features")
            check_member(options.edges, EDGES, f"{path}.edges")
            if len(feature_names(options)) != 2:
                raise UserError(f"config.{path}.feature={options.feature!r} must be NODES+EDGES, two features' names")
        if options.kind == "knowledge":
            check_positive(options.nodes, f"{path}.nodes")
            check_positive(options.entities, f"{path}.entities")
    fusion_class = lookup(FUSIONS, config.model.fusion.name, "config.model.fusion.name")
    for name, options in data.targets.items():
        if options.kind != "classification" and fusion_class.declares.classes_only:
            raise UserError(
                f"config.model.fusion.name={config.model.fusion.name!r} is for classes that exclude each other, and "
                f"data.targets.{name} is {options.kind}; choose late_mean"
            )
        check_member(options.loss, LOSSES[options.kind], f"data.targets.{name}.loss")


# What one encoder asks of modalities that share it; of other kinds, numbers mean what their own data says.
ALIKE = {
    "image": ("size", "channels"),
    "video": ("size", "channels", "frames"),
    "audio": ("rate",),
    "text": ("tokenizer",),
}


def _check_alike(one: ConfigDict, other: ConfigDict, where: str) -> None:
    """Raises UserError unless one encoder reads two modalities of one kind with the same meaning."""
    if one.kind not in ALIKE:
        raise UserError(f"{where}: an encoder is shared by {', '.join(ALIKE)}, not by two of kind {one.kind}")
    for key in ALIKE[one.kind]:
        if one.get(key) != other.get(key):
            raise UserError(f"{where}: one encoder cannot read a {key} of {one.get(key)} and of {other.get(key)}")
    if one.kind == "text" and one.tokenizer in TOKENIZERS:
        raise UserError(f"{where}: each text learns its own {one.tokenizer} vocabulary; give both a tokenizer's FILE")


def _check_statistics(config: ConfigDict, name: str, where: str) -> None:
    """Raises UserError where an encoder that others share learns statistics, which each modality has of its own."""
    encoder = config.model.encoders[name]
    if encoder.get("norm") == "batch" and encoder.freeze < config.steps:
        raise UserError(f"{where}: norm=batch keeps one mean and variance for both: choose group or layer for {name}")


def _check_together(config: ConfigDict, name: str, others: Iterable[str], path: str) -> None:
    """Checks modalities that are read by one encoder: `others` beside or in place of `name`."""
    others = tuple(others)
    if len(set(others)) < len(others):
        raise UserError(f"config.{path}={others} names one modality twice")
    for other in others:
        check_member(other, set(config.data.modalities) - {name}, path)
        kinds = [config.data.modalities[m].kind for m in (name, other)]
        if kinds[0] != kinds[1] or (path.endswith("join") and kinds[0] not in ("image", "video")):
            raise UserError(f"config.{path}={other!r}: one encoder cannot read {kinds[0]} and {kinds[1]} together")
        if path.endswith("share"):
            where = f"config.{path}={other!r}"
            _check_alike(config.data.modalities[name], config.data.modalities[other], where)
            if other not in config.model.encoders:
                raise UserError(f"{where} has no encoder of its own")
            _check_statistics(config, other, where)
