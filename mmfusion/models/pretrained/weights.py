"""Loads published weights from safetensors files into an encoder's parameters; every tensor is accounted for.

`layouts.py` has the parameter names of torchvision, timm and Hugging Face transformers, for VGG, AlexNet, ResNet,
ConvNeXt, ViT, BERT, RoBERTa and ModernBERT.

O I output and input channels · h w kernel · N positions · D width
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mmfusion.data.regular_files import read_file
from mmfusion.errors import UserError, one_line
from mmfusion.models.pretrained.header import check_header
from mmfusion.models.pretrained.layouts import FAMILIES, Tensors
from mmfusion.models.pretrained.sources import WEIGHTS, fetch, find

INDEX_BYTES = 64 << 20
RUN = "run:"  # prefix of `init` values that name another run
# Published tensor names -> our parameter names; norms converted from TensorFlow have gamma and beta.
LEAVES = {
    "weight": ("kernel", "scale", "embedding"), "gamma": ("scale",), "bias": ("bias",), "beta": ("bias",),
    "running_mean": ("mean",), "running_var": ("var",),
}  # fmt: skip


class Loaded(NamedTuple):
    """Variables of an encoder with published weights.

    Attributes:
      params, batch_stats: variables of the encoder, as nested dicts.
      left_out: published tensors without a parameter in the encoder: classifiers, and layers that the config omits.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    left_out: list[str]


def read(source: str, cache: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file, by name.

    Args:
      source: a file, a folder with `model.safetensors` or shards and their index, or `owner/name` of a model on the
        Hugging Face hub, whose `model.safetensors` is downloaded once.
      cache: the folder for downloads.

    Raises:
      UserError: the file does not exist, cannot be downloaded, or is not safetensors.
    """
    path = find(source)
    if path is None:
        downloaded = fetch(source, Path(cache))
        if downloaded is None:
            raise UserError(f"the model has no {WEIGHTS} on the hub", path="init", value=source)
        files = [downloaded]
    elif path.is_dir():
        index = path / f"{WEIGHTS}.index.json"
        files = [path / name for name in _shards(index, source)] if index.exists() else [path / WEIGHTS]
    else:
        files = [path]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        if file.suffix != ".safetensors":
            message = f"{file.name} is not a .safetensors file; pickles are not supported"
            raise UserError(message, path="init", value=source)
        try:
            check_header(file)
            shard = load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UserError(f"{file} cannot be read as safetensors: {reason}", path="init", value=source) from error
        if duplicates := sorted(tensors.keys() & shard.keys()):
            raise UserError(
                f"{file.name} has {duplicates[0]!r}, which another file also has", path="init", value=source
            )
        tensors |= shard
    return tensors


def _shards(index: Path, source: str) -> list[str]:
    """Returns the names of the files listed in an index, which are in the same folder."""
    try:
        names = sorted(set(json.loads(read_file(index, INDEX_BYTES))["weight_map"].values()))
        if any(name != Path(name).name for name in names):
            raise ValueError("a listed file is not in the folder of the index")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index.name} lists no files ({error!r})", path="init", value=source) from error
    return names


def from_run(source: str) -> bool:
    """Returns whether `init` names another run instead of published weights."""
    return source.startswith(RUN)


def unpublished(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the layers of an encoder that published weights lack: those that map the features to tokens."""
    return ("tokens",) if "tokens" in params else ("project", "norm")


def load(encoder: nn.Module, params: Tensors, batch_stats: Tensors, tensors: Tensors, source: str) -> Loaded:
    """Replaces the initialised variables of an encoder with published weights.

    The layers that map the features to tokens (`tokens`, or `project` and `norm`) keep their values. Kernels and batch
    statistics are converted to our layout. Input kernels of three channels are summed for images of one channel; for
    other numbers they are repeated and scaled by 3 / channels, as in timm. A square grid of position embeddings is
    resized, as in timm.

    Args:
      encoder: the encoder.
      params, batch_stats: its variables, as nested dicts.
      tensors: name -> array, see `read`.
      source: their file, folder or hub name, for error messages.

    Raises:
      UserError: no weights are known for this encoder, a tensor is unexpected or missing, or a shape differs.
    """
    family = next((rules for encoder_class, rules in FAMILIES.items() if isinstance(encoder, encoder_class)), None)
    if family is None:
        known = ", ".join(encoder_class.__name__ for encoder_class in FAMILIES)
        message = f"published weights are known for {known}, not {type(encoder).__name__}"
        raise UserError(message, path="init", value=source)
    variables: dict[str, dict[str, Any]] = {
        "params": flax.traverse_util.flatten_dict(dict(params), sep="/"),
        "batch_stats": flax.traverse_util.flatten_dict(dict(batch_stats), sep="/"),
    }
    kept = unpublished(params)
    rules, droppable = family(tensors)
    patterns = [
        (re.compile(rf"(?:{pattern})(?:[._](?P<leaf>{'|'.join(LEAVES)}))?"), target) for pattern, target in rules
    ]
    filled: dict[tuple[str, str], np.ndarray] = {}
    left_out, unexpected = [], []
    for name, tensor in tensors.items():
        targets = _matching_paths(name, patterns, variables)
        if targets:
            divides = tensor.ndim and len(tensor) % len(targets) == 0
            pieces = np.split(tensor, len(targets)) if divides else [tensor] * len(targets)
            for (collection, path), piece in zip(targets, pieces, strict=True):
                if (collection, path) in filled:
                    raise UserError(f"{name!r} is a second tensor for {path}", path="init", value=source)
                filled[collection, path] = _fitted(piece, variables[collection][path], path, name, source)
        elif re.fullmatch(rf"(\w+\.)?({droppable})(\..*)?|(.*\.)?(num_batches_tracked|position_ids)", name):
            left_out.append(name)
        else:
            unexpected.append(name)
    missing = [
        path
        for collection, leaves in variables.items()
        for path in leaves
        if (collection, path) not in filled and path.partition("/")[0] not in kept
    ]
    problems = []
    if unexpected:
        problems.append(f"unexpected tensors ({len(unexpected)}): {', '.join(unexpected)}")
    if missing:
        problems.append(f"missing parameters ({len(missing)}): {', '.join(missing)}")
    if problems:
        raise UserError(f"does not fit {type(encoder).__name__}: {'; '.join(problems)}", path="init", value=source)
    for (collection, path), value in filled.items():
        variables[collection][path] = value
    nested = {name: flax.traverse_util.unflatten_dict(leaves, sep="/") for name, leaves in variables.items()}
    return Loaded(nested["params"], nested["batch_stats"], left_out)


def _matching_paths(
    name: str, patterns: list[tuple[re.Pattern, str]], variables: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Returns the (collection, path) pairs that a published tensor fills: several if it is split."""
    for pattern, target in patterns:
        if not (match := pattern.fullmatch(name)):
            continue
        suffixes = [f"/{suffix}" for suffix in LEAVES[match["leaf"]]] if match["leaf"] else [""]
        matches = [
            (collection, f"{path}{suffix}")
            for path in match.expand(target).split("+")
            for suffix in suffixes
            for collection, leaves in variables.items()
            if f"{path}{suffix}" in leaves
        ]
        if matches:
            return matches
    return []


def _fitted(tensor: np.ndarray, parameter: Any, path: str, name: str, source: str) -> np.ndarray:
    """Returns a published tensor as our parameter; raises UserError if its shape differs, or it is not finite."""
    shape = np.shape(parameter)
    if tensor.dtype.kind != "f":
        raise UserError(f"{name} is of {tensor.dtype}, not floats", path="init", value=source)
    try:
        converted = _convert(tensor, shape, path)
    except (ValueError, IndexError):  # of a rank or a size that is not that of any layout
        converted = tensor
    if converted.shape != shape:
        message = f"{name} of shape {list(tensor.shape)} does not fit {path} of shape {list(shape)}"
        raise UserError(message, path="init", value=source)
    with np.errstate(over="ignore"):
        converted = converted.astype(np.float32)
    if not np.isfinite(converted).all():
        raise UserError(f"{name} has values that are not finite in float32", path="init", value=source)
    return converted


def _convert(tensor: np.ndarray, shape: tuple[int, ...], path: str) -> np.ndarray:
    """Returns a published tensor in the layout of our parameter, and in its shape if it fits."""
    if path.endswith("kernel"):
        if tensor.ndim == 2 and "/fc6/" in f"/{path}":  # flattened channels-first, ours channels-last
            side = 6 if shape[0] % 36 == 0 and shape[0] % 49 else 7
            tensor = tensor.reshape(len(tensor), -1, side, side)
        if tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)  # [h, w, I, O]
            if len(shape) == 4 and shape[2] != 3 and tensor.shape[2] == 3 and path.startswith(INPUT_LAYERS):
                summed = tensor.sum(axis=2, keepdims=True)
                repeated = np.resize(tensor.transpose(2, 0, 1, 3), (shape[2], *shape[:2], shape[3]))
                repeated = repeated.transpose(1, 2, 0, 3)
                tensor = summed if shape[2] == 1 else repeated * (3 / shape[2])
            tensor = tensor.reshape(shape) if tensor.size == math.prod(shape) and len(shape) == 2 else tensor
        elif tensor.ndim == 2:
            tensor = tensor.T
    elif path == "positions" and tensor.ndim == 3:  # [1, N, D]
        tensor = tensor[0] if tensor[0].shape == shape else _resize_positions(tensor[0], shape[0])
    elif tensor.size == math.prod(shape):
        tensor = tensor.reshape(shape)
    return tensor


def _resize_positions(positions: np.ndarray, count: int) -> np.ndarray:
    """Returns position embeddings `[count, D]`: the class token's, and a square grid's resized to `count - 1` cells."""
    old, new = (math.isqrt(size - 1) for size in (len(positions), count))
    if old**2 != len(positions) - 1 or new**2 != count - 1:
        return positions
    grid = positions[1:].reshape(old, old, -1).astype(np.float32)
    grid = jax.image.resize(grid, (new, new, grid.shape[2]), "bicubic")
    return np.concatenate([positions[:1], np.asarray(grid).reshape(new * new, -1)])


INPUT_LAYERS = ("conv_stem", "conv0_0", "conv1/", "shrink0", "patches")
