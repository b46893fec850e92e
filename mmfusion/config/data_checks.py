"""Checks of the section `data`: the dataset's name, the modalities and the targets."""

import re
from typing import Any

from mmfusion.config.checks import check_member, check_positive
from mmfusion.config.fields import DataConfig, ModalityConfig, RunConfig
from mmfusion.data import embedding, images, sequence, sources
from mmfusion.data.graph import EDGES
from mmfusion.data.modalities import feature_names
from mmfusion.data.table_dataset import is_table
from mmfusion.data.targets import BALANCED, is_balanced
from mmfusion.data.text import FILES, TOKENIZERS
from mmfusion.errors import UserError
from mmfusion.metrics import REGRESSION_GROUPS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import LOSSES
from mmfusion.registry import lookup

RESERVED = ("bias", "joint", "learned", "self")  # names that strategies use beside those of modalities


def check_data(run: RunConfig) -> None:
    """Raises UserError where the dataset, a modality or a target is wrong."""
    _check_dataset(run.data)
    for name, modality in run.data.modalities.items():
        _check_modality(name, modality)
    _check_targets(run)
    _check_sampler(run.data)


def _check_dataset(data: DataConfig) -> None:
    for name in filter(None, (data.name, data.fallback_name)):
        if not is_table(name):
            sources.check_name(name, data.dir)
    if not data.valid and not data.valid_fraction:
        message = "must be above 0, or config.data.valid must name a split"
        raise UserError(message, path="config.data.valid_fraction", value=data.valid_fraction)
    if data.valid and data.group and not data.folds:
        message = "has no effect where config.data.valid names a split; leave one of them empty"
        raise UserError(message, path="config.data.group", value=data.group)
    if data.test_fraction != DataConfig.test_fraction and not (is_table(data.name) or data.time):
        message = "has an effect on tables only; give a slice as config.data.test"
        raise UserError(message, path="config.data.test_fraction", value=data.test_fraction)
    _check_division(data)
    for name in filter(None, data.missing_in.split("+")):
        check_member(name, data.modalities, "data.missing_in", "modality")
    for section, noun in (("modalities", "modality"), ("targets", "target")):
        if not getattr(data, section):
            raise UserError(f"must have at least one {noun}", path=f"config.data.{section}")


def _check_division(data: DataConfig) -> None:
    """Raises UserError where folds or a time contradict each other, or leave another key without effect."""
    ways = [key for key in ("folds", "fold_by", "time") if getattr(data, key)]
    if len(ways) > 1:
        message = f"cannot be combined with config.data.{ways[0]}: give one of folds, fold_by and time"
        raise UserError(message, path=f"config.data.{ways[1]}", value=getattr(data, ways[1]))
    if data.folds == 1:
        raise UserError("must be 0, or at least 2", path="config.data.folds", value=data.folds)
    if data.folds and data.fold >= data.folds:
        raise UserError(f"must be below {data.folds}, config.data.folds", path="config.data.fold", value=data.fold)
    if data.fold and not (data.folds or data.fold_by):
        message = "has no effect without config.data.folds or config.data.fold_by"
        raise UserError(message, path="config.data.fold", value=data.fold)
    if not ways:
        return
    unread = {"test": "test"}
    unread |= {"valid": "", "group": ""} if data.time else {"test_fraction": DataConfig.test_fraction}
    for key, default in unread.items():
        if getattr(data, key) != default:
            message = f"has no effect with config.data.{ways[0]}, which divides the rows of train; leave it {default!r}"
            raise UserError(message, path=f"config.data.{key}", value=getattr(data, key))
    if data.time and not data.test_fraction:
        raise UserError("must be above 0 with config.data.time", path="config.data.test_fraction", value=0.0)


def _check_modality(name: str, modality: ModalityConfig) -> None:
    path = f"data.modalities.{name}"
    if not re.fullmatch("[a-z][a-z0-9]*", name) or name in RESERVED:
        message = f"a modality's name is lowercase letters and digits, and none of {', '.join(RESERVED)}"
        raise UserError(message, path=f"config.{path}")
    if modality.kind in MODALITY_CHECKS:  # types from elsewhere have none
        MODALITY_CHECKS[modality.kind](modality, path)


def _check_text(modality: ModalityConfig, path: str) -> None:
    options = modality.options
    check_positive(options["length"], f"{path}.length")
    if options["tokenizer"].endswith(FILES):
        if options["augment"]["drop"]:
            message = f"needs a tokenizer of ours, {' or '.join(TOKENIZERS)}: their out-of-vocabulary word is known"
            raise UserError(message, path=f"config.{path}.augment.drop", value=options["augment"]["drop"])
        return
    check_member(options["tokenizer"], TOKENIZERS, f"{path}.tokenizer", "tokenizer")
    smallest = TOKENIZERS[options["tokenizer"]][1]
    if options["vocabulary_size"] < smallest:
        message = f"must be at least {smallest}"
        raise UserError(message, path=f"config.{path}.vocabulary_size", value=options["vocabulary_size"])


def _check_audio(modality: ModalityConfig, path: str) -> None:
    check_positive(modality.options["rate"], f"{path}.rate")
    check_positive(modality.options["seconds"], f"{path}.seconds")


def _check_image(modality: ModalityConfig, path: str) -> None:
    _check_pixels(modality, path)
    value_range = modality.options["range"]
    if value_range and not (len(value_range) == 2 and value_range[0] < value_range[1]):
        message = "must be empty, or (low, high) with low < high"
        raise UserError(message, path=f"config.{path}.range", value=value_range)


def _check_pixels(modality: ModalityConfig, path: str) -> None:
    options = modality.options
    size, channels = options["size"], options["channels"]
    if len(size) != 2 or min(size) < 1:
        raise UserError("must be (H, W) in pixels", path=f"config.{path}.size", value=size)
    if channels < 1:
        raise UserError("must be at least 1", path=f"config.{path}.channels", value=channels)
    for name in ("mean", "std"):
        if len(options[name]) not in (1, channels):
            raise UserError(f"must have 1 or {channels} numbers", path=f"config.{path}.{name}", value=options[name])
    if min(options["std"]) <= 0:
        raise UserError("must be above 0", path=f"config.{path}.std", value=options["std"])


def _check_video(modality: ModalityConfig, path: str) -> None:
    _check_pixels(modality, path)
    check_positive(modality.options["frames"], f"{path}.frames")


def _check_images(modality: ModalityConfig, path: str) -> None:
    _check_pixels(modality, path)
    check_positive(modality.options["count"], f"{path}.count")
    check_member(modality.options["pool"], images.POOLS, f"{path}.pool", "pool")


def _check_embedding(modality: ModalityConfig, path: str) -> None:
    check_member(modality.options["normalize"], embedding.NORMALIZATIONS, f"{path}.normalize", "normalisation")


def _check_sequence(modality: ModalityConfig, path: str) -> None:
    check_positive(modality.options["length"], f"{path}.length")
    check_member(modality.options["normalize"], sequence.NORMALIZATIONS, f"{path}.normalize", "normalisation")


def _check_table(modality: ModalityConfig, path: str) -> None:
    for key in ("categorical", "dates"):
        for column in modality.options[key]:
            check_member(column, feature_names(modality.to_dict()), f"{path}.{key}", "column")


def _check_graph(modality: ModalityConfig, path: str) -> None:
    options = modality.options
    check_positive(options["nodes"], f"{path}.nodes")
    check_positive(options["features"], f"{path}.features")
    check_member(options["edges"], EDGES, f"{path}.edges", "form of edges")
    if len(feature_names(modality.to_dict())) != 2:
        message = "must be NODES+EDGES, the names of two features"
        raise UserError(message, path=f"config.{path}.feature", value=modality.feature)


def _check_knowledge(modality: ModalityConfig, path: str) -> None:
    check_positive(modality.options["nodes"], f"{path}.nodes")
    check_positive(modality.options["entities"], f"{path}.entities")


MODALITY_CHECKS = {
    "image": _check_image,
    "text": _check_text,
    "audio": _check_audio,
    "video": _check_video,
    "table": _check_table,
    "embedding": _check_embedding,
    "sequence": _check_sequence,
    "images": _check_images,
    "graph": _check_graph,
    "knowledge": _check_knowledge,
}


def _check_targets(run: RunConfig) -> None:
    fusion = run.model.fusion.name
    strategy: Any = lookup(FUSIONS, fusion, "config.model.fusion.name")
    for name, target in run.data.targets.items():
        if strategy.declares.classes_only and target.kind != "classification":
            message = f"needs exclusive classes, and data.targets.{name} is {target.kind}: choose late_mean"
            raise UserError(message, path="config.model.fusion.name", value=fusion)
        path, options = f"data.targets.{name}", target.options
        check_member(options["loss"], LOSSES[target.kind], f"{path}.loss", "loss")
        for group in options.get("metrics", ()):
            check_member(group, REGRESSION_GROUPS, f"{path}.metrics", "group of metrics")
        if target.kind == "multilabel" and is_balanced(options):
            message = "needs exclusive classes; give one weight per label"
            raise UserError(message, path=f"config.{path}.class_weights", value=BALANCED)


def _check_sampler(data: DataConfig) -> None:
    classified = [name for name, target in data.targets.items() if target.kind == "classification"]
    if data.sampler == BALANCED and len(classified) != 1:
        message = f"needs one classification target, and config.data.targets has {len(classified)}"
        raise UserError(message, path="config.data.sampler", value=data.sampler)
