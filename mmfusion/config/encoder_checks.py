"""Checks of the section `model.encoders`: which encoder reads what, alone, joined or shared."""

from collections.abc import Sequence

from mmfusion.config.checks import check_member
from mmfusion.config.fields import EncoderConfig, RunConfig
from mmfusion.data.text import TOKENIZERS
from mmfusion.errors import UserError
from mmfusion.models.encoders import ENCODERS, can_read
from mmfusion.registry import lookup

# Options that modalities with a shared encoder must have alike; other types of modality cannot share one.
SHARED_OPTIONS = {
    "image": ("size", "channels"),
    "images": ("size", "channels", "pool"),
    "video": ("size", "channels", "frames"),
    "audio": ("rate",),
    "text": ("tokenizer",),
}
JOINED_KINDS = ("image", "video")


def check_encoders(run: RunConfig) -> None:
    """Raises UserError where encoders and modalities do not fit each other."""
    encoders = run.model.encoders
    joined = {other: modality for modality, encoder in encoders.items() for other in encoder.join}
    if run.data.modalities.keys() != encoders.keys() | joined.keys():
        raise UserError(
            f"has encoders of {', '.join(sorted({*encoders, *joined}))}, and config.data.modalities has "
            f"{', '.join(sorted(run.data.modalities))}: they must be the same",
            path="config.model.encoders",
        )
    for modality, encoder in encoders.items():
        path = f"config.model.encoders.{modality}"
        if modality in joined:
            raise UserError(f"the encoder of {joined[modality]} reads it, too: leave it out here", path=path)
        _check_reads(run, modality, encoder, path)
        _check_join(run, modality, encoder.join, f"{path}.join")
        if encoder.share:
            _check_share(run, modality, encoder, path)
        encoder_class = lookup(ENCODERS, encoder.name, f"{path}.name")
        if encoder.layer_decay != 1 and getattr(encoder_class, "layer_order", None) is None:
            message = f"the layers of {encoder.name} are not sequential: set 1"
            raise UserError(message, path=f"{path}.layer_decay", value=encoder.layer_decay)


def _check_reads(run: RunConfig, modality: str, encoder: EncoderConfig, path: str) -> None:
    kind = run.data.modalities[modality].kind
    if not can_read(lookup(ENCODERS, encoder.name, f"{path}.name"), kind):
        fitting = [name for name, encoder_class in ENCODERS.items() if can_read(encoder_class, kind)]
        raise UserError(f"does not read {kind}", path=f"{path}.name", value=encoder.name, choices=fitting)


def _check_join(run: RunConfig, modality: str, others: Sequence[str], path: str) -> None:
    if len(set(others)) < len(others):
        raise UserError("names a modality twice", path=path, value=tuple(others))
    for other in others:
        _check_other(run, modality, other, path)
        kind = run.data.modalities[other].kind
        if kind not in JOINED_KINDS:
            raise UserError(f"only {' or '.join(JOINED_KINDS)} can be joined, not {kind}", path=path, value=other)


def _check_share(run: RunConfig, modality: str, encoder: EncoderConfig, path: str) -> None:
    where, other = f"{path}.share", encoder.share
    _check_other(run, modality, other, where)
    _check_alike(run, modality, other, where)
    if other not in run.model.encoders:
        raise UserError("this modality has no encoder of its own", path=where, value=other)
    shared = run.model.encoders[other]
    if shared.options.get("norm") == "batch" and shared.freeze < run.steps:
        message = f"norm=batch keeps one mean and variance for both modalities: set norm=group or layer for {other}"
        raise UserError(message, path=where, value=other)
    if shared.share:
        raise UserError(f"shares another's encoder: name {shared.share!r}", path=where, value=other)
    if encoder.init or encoder.freeze or encoder.layer_decay != 1:
        raise UserError(f"the weights are {other}'s: set init, freeze and layer_decay there", path=path)


def _check_other(run: RunConfig, modality: str, other: str, path: str) -> None:
    """Raises UserError unless `other` is another modality of the same type."""
    check_member(other, set(run.data.modalities) - {modality}, path.removeprefix("config."), "modality")
    kinds = [run.data.modalities[name].kind for name in (modality, other)]
    if kinds[0] != kinds[1]:
        raise UserError(f"one encoder cannot read {kinds[0]} and {kinds[1]}", path=path, value=other)


def _check_alike(run: RunConfig, modality: str, other: str, path: str) -> None:
    """Raises UserError unless the inputs of two modalities of one type mean the same."""
    first, second = (run.data.modalities[name] for name in (modality, other))
    if first.kind not in SHARED_OPTIONS:
        message = f"an encoder can be shared by {', '.join(SHARED_OPTIONS)}, not by {first.kind}"
        raise UserError(message, path=path, value=other)
    for key in SHARED_OPTIONS[first.kind]:
        if first.options[key] != second.options[key]:
            message = f"one encoder cannot read {key}={first.options[key]} and {key}={second.options[key]}"
            raise UserError(message, path=path, value=other)
    if first.kind == "text" and first.options["tokenizer"] in TOKENIZERS:
        message = "each text has a vocabulary of its own: give both the file of one tokenizer"
        raise UserError(message, path=path, value=other)
