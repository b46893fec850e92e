"""Reads the sizes of published text encoders from their `config.json`, as transformers writes it."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from mmfusion.data.regular_files import read_file
from mmfusion.errors import UserError, one_line
from mmfusion.models.pretrained.sources import companion

FILE = "config.json"
FILE_BYTES = 1 << 20
TOKENIZERS = ("tokenizer.json", "vocab.txt")  # the first one that a model has
LARGEST = 1 << 21  # of a size
# Names of published activations -> ours.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip
SIZES = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
    "mlp": "intermediate_size", "embeddings": "vocab_size",
}  # fmt: skip


class Architecture(NamedTuple):
    """What a `config.json` says.

    Attributes:
      encoder: the name of the encoder that has these layers.
      options: its options.
    """

    encoder: str
    options: dict[str, Any]


def read_architecture(source: str) -> Architecture | None:
    """Returns the architecture of a published text encoder.

    Args:
      source: a folder, or `owner/name` of a model on the hub; see `weights.read`.

    Returns:
      The architecture, or None if there is no `config.json` with a `model_type`.

    Raises:
      UserError: the file cannot be read or downloaded, or it is that of another architecture.
    """
    path = companion(source, FILE)
    if path is None:
        return None
    try:
        values = json.loads(read_file(path.expanduser(), FILE_BYTES))
        if not isinstance(values, dict) or "model_type" not in values:
            return None
        kind = str(values["model_type"])
        if kind not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"model_type {kind[:40]!r} is none of those that a text encoder has here, {known}")
        encoder, options = MODEL_TYPES[kind]
        return Architecture(encoder, options(values))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{FILE}: {reason}", path="init", value=source) from error


def tokenizer_of(source: str) -> str | None:
    """Returns the path of a published encoder's tokenizer, None if it has none that can be read.

    Raises:
      UserError: it cannot be downloaded.
    """
    paths = (companion(source, file) for file in TOKENIZERS)
    return next((str(path) for path in paths if path is not None), None)


def _size(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if type(value) is not int or not 0 < value <= LARGEST:
        raise ValueError(f"{key} is {str(value)[:40]}, not a whole number from 1 to {LARGEST:,}")
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{key} is {str(value)[:40]}, not a number above 0")
    return float(value)


def _activation(values: Mapping[str, Any], key: str) -> str:
    name = str(values.get(key))
    if name not in ACTIVATIONS:
        raise ValueError(f"{key} is {name[:40]!r}, none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _bert(values: Mapping[str, Any]) -> dict[str, Any]:
    if values.get("position_embedding_type", "absolute") != "absolute" or values.get("is_decoder", False):
        raise ValueError("only encoders with absolute positions are supported")
    return {
        **{option: _size(values, key) for option, key in SIZES.items()},
        "positions": _size(values, "max_position_embeddings"),
        "segments": _size(values, "type_vocab_size"),
        "offset": 0,
        "epsilon": _number(values, "layer_norm_eps"),
        "activation": _activation(values, "hidden_act"),
    }


def _roberta(values: Mapping[str, Any]) -> dict[str, Any]:
    options = _bert(values)
    offset = _size({"pad_token_id": 1, **values}, "pad_token_id") + 1  # positions count from the padding id
    if options["positions"] <= offset:
        raise ValueError(f"max_position_embeddings is {options['positions']}, and the first position has row {offset}")
    return {**options, "positions": options["positions"] - offset, "offset": offset}


def _modernbert(values: Mapping[str, Any]) -> dict[str, Any]:
    thetas = {"full_attention": values.get("global_rope_theta"), "sliding_attention": values.get("local_rope_theta")}
    for kind, parameters in (values.get("rope_parameters") or {}).items():  # of transformers 5
        if parameters.get("rope_type", "default") != "default" or kind not in thetas:
            raise ValueError("only the default rope_type is supported")
        thetas[kind] = parameters.get("rope_theta")
    return {
        **{option: _size(values, key) for option, key in SIZES.items()},
        "positions": _size(values, "max_position_embeddings"),
        "window": _size(values, "local_attention"),
        "every": _global_every(values),
        "theta": _number(thetas, "full_attention"),
        "local_theta": _number(thetas, "sliding_attention"),
        "epsilon": _number(values, "norm_eps"),
        "activation": _activation(values, "hidden_activation"),
    }


def _global_every(values: Mapping[str, Any]) -> int:
    """Returns n if blocks 0, n, 2n, ... attend to all positions; raises ValueError for another pattern."""
    kinds = values.get("layer_types")  # of transformers 5
    if kinds is None:
        return _size({"global_attn_every_n_layers": 3, **values}, "global_attn_every_n_layers")
    is_global = [kind == "full_attention" for kind in kinds]
    every = next((n for n in range(1, len(kinds)) if is_global[n]), len(kinds))
    if is_global != [layer % every == 0 for layer in range(_size(values, "num_hidden_layers"))]:
        raise ValueError("layer_types are not full_attention at every n-th layer from the first")
    return every


# model_type -> the encoder, and its options from the file.
MODEL_TYPES = {
    "bert": ("bert", _bert),
    "roberta": ("roberta", _roberta),
    "xlm-roberta": ("roberta", _roberta),
    "camembert": ("roberta", _roberta),
    "modernbert": ("modernbert", _modernbert),
}
