"""Applies what the files of a published text encoder say of it: its encoder, its sizes and its tokenizer."""

import functools
import sys
from typing import Any

from ml_collections import ConfigDict

from mmfusion.config.choices import choice_options, choose
from mmfusion.data import text
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.pretrained.architectures import Architecture, read_architecture, tokenizer_of
from mmfusion.models.pretrained.layouts import FAMILIES
from mmfusion.models.pretrained.weights import from_run
from mmfusion.registry import lookup

PROBE = "A Café's naïve price: £1,234.50 - don't RE-RUN_it 東京"  # tokenizers differ in case, accents and punctuation


def adopt(config: ConfigDict) -> None:
    """Sets the options of encoders whose `init` is a published text encoder with a `config.json`, in place.

    Options at their defaults get the values of the file, and the tokenizer of the modality, if it is at its default,
    that of the folder. Another encoder becomes the published one. What differs is kept, with a warning.

    Args:
      config: a config that the user gave, before it is checked.

    Raises:
      UserError: the files cannot be read or downloaded, or they are those of another architecture.
    """
    encoders = config.model.encoders
    for m, section in list(encoders.items()):
        init = section.get("init", "")
        if not isinstance(init, str) or not init or from_run(init) or not _is_text(config, m):
            continue
        architecture = read_architecture(init)
        if architecture is None:
            continue
        changes = _adopt_encoder(config, m, architecture)
        tokenizer = tokenizer_of(init)
        for name in (m, *(other for other in encoders if encoders[other].get("share") == m)):
            if tokenizer and _is_text(config, name):
                changes += _adopt_tokenizer(config, name, tokenizer)
        if changes:
            _report(f"init   {m}: {init} sets {', '.join(changes)}")


def _is_text(config: ConfigDict, modality: str) -> bool:
    return config.data.modalities.get(modality, {}).get("kind") == "text"


def _adopt_encoder(config: ConfigDict, modality: str, architecture: Architecture) -> list[str]:
    """Sets the encoder and its options, and returns `key=value` of what was set."""
    path, changes = f"model.encoders.{modality}", []
    before = lookup(ENCODERS, config.model.encoders[modality].name, f"config.{path}.name")
    published = ENCODERS[architecture.encoder]
    if not any(issubclass(before, family) and issubclass(published, family) for family in FAMILIES):
        choose(config, path, architecture.encoder)
        changes.append(f"name={architecture.encoder}")
    section: Any = config.model.encoders[modality]
    defaults = choice_options(path, section.name)
    for key, value in architecture.options.items():
        given = section.get(key, defaults[key])
        if given == value:
            continue
        if given != defaults[key]:
            _report(f"warning: config.{path}.{key}={given}: the weights were trained with {value}")
            continue
        with config.unlocked(), config.ignore_type():
            section[key] = value
        changes.append(f"{key}={value}")
    return changes


def _adopt_tokenizer(config: ConfigDict, modality: str, tokenizer: str) -> list[str]:
    """Sets the tokenizer of a modality, or warns if it is another one; returns `key=value` of what was set."""
    section = config.data.modalities[modality]
    given = section.get("tokenizer", text.OPTIONS["tokenizer"])
    if given == text.OPTIONS["tokenizer"]:
        with config.unlocked():
            section.tokenizer = tokenizer
        return [f"tokenizer={tokenizer}"]
    if given != tokenizer and not _same_tokens(given, tokenizer):
        where = f"config.data.modalities.{modality}.tokenizer={given}"
        _report(f"warning: {where} is not the tokenizer that the weights were trained with: set {tokenizer}")
    return []


def _same_tokens(given: str, published: str) -> bool:
    if not given.endswith(text.FILES):
        return False
    first, second = (text.from_file(path) for path in (given, published))
    return first.get_vocab() == second.get_vocab() and first.encode(PROBE).ids == second.encode(PROBE).ids


@functools.cache  # once a process: an ablation makes a config for each run
def _report(line: str) -> None:
    print(line, file=sys.stderr)
