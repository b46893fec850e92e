"""Published weights in safetensors files -> an encoder's parameters, every tensor accounted for.

Names of torchvision, timm and Hugging Face's transformers are known, for VGG, AlexNet, ResNet, ConvNeXt, ViT and BERT
(`published.py`).

O I channels out and in · h w kernel · N positions · D width
"""

import json
import math
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import requests
from safetensors import SafetensorError
from safetensors.numpy import load_file

from mmfusion.errors import UserError
from mmfusion.models.pretrained.layouts import FAMILIES, Tensors

HUB = "https://huggingface.co/{name}/resolve/main/model.safetensors"
FILE = "model.safetensors"
RUN = "run:"  # what `init` begins with where it names another run
# What a published module's tensors are called, and ours; norms that come from TensorFlow have a gamma and a beta.
LEAVES = {
    "weight": ("kernel", "scale", "embedding"), "gamma": ("scale",), "bias": ("bias",), "beta": ("bias",),
    "running_mean": ("mean",), "running_var": ("var",),
}  # fmt: skip


class Loaded(NamedTuple):
    """An encoder's variables with published weights in them.

    Attributes:
      params, batch_stats: of the encoder, as nested dicts.
      left_out: published tensors that the encoder has no use for: classifiers, and layers that the config leaves out.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    left_out: list[str]


def read(source: str, cache: str | Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file by name.

    Args:
      source: a file, a folder with `model.safetensors` or shards and their index, or `owner/name` of a model on the
        Hugging Face hub, whose `model.safetensors` is fetched once.
      cache: the folder for what is fetched.

    Raises:
      UserError: there is no such file, it cannot be fetched, or it is not safetensors.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        index = path / f"{FILE}.index.json"
        files = [path / FILE]
        if index.exists():
            files = [path / name for name in _shards(index, source)]
    elif path.exists():
        files = [path]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        files = [_fetch(source, Path(cache))]
    else:
        raise UserError(f"init={source!r}: no such file or folder, and no owner/name of a model on the hub")
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        if file.suffix != ".safetensors":
            raise UserError(f"init={source!r}: {file.name} is not a .safetensors file; pickled weights are not read")
        try:
            more = load_file(file)
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy does not have
            raise UserError(f"init={source!r}: {file} cannot be read as safetensors: {error}") from error
        if twice := sorted(tensors.keys() & more.keys()):
            raise UserError(f"init={source!r}: {file.name} has {twice[0]!r}, which another file has, too")
        tensors |= more
    return tensors


def _shards(index: Path, source: str) -> list[str]:
    """Returns the names of the files that an index lists, which are in its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(name != Path(name).name for name in names):
            raise ValueError("a file that it names is not beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"init={source!r}: {index.name} lists no files ({error!r})") from error
    return names


def from_run(source: str) -> bool:
    """Whether `init` of a config names another run, and no published weights."""
    return source.startswith(RUN)


def unpublished(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns an encoder's layers that published weights cannot fill: what makes tokens of the cells."""
    return ("tokens",) if "tokens" in params else ("project", "norm")


def _fetch(name: str, cache: Path) -> Path:
    target = cache / name / FILE
    if target.exists():
        return target
    url = HUB.format(name=name)
    try:
        with requests.get(url, stream=True, timeout=30) as answer:
            answer.raise_for_status()
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{uuid.uuid4().hex}.part")  # others may fetch it, too
            with partial.open("wb") as file:
                for chunk in answer.iter_content(1 << 20):
                    file.write(chunk)
            partial.replace(target)
    except requests.RequestException as error:
        raise UserError(
            f"init={name!r}: no such file here, and {url} cannot be fetched ({error}): "
            "fetch it by hand and give its path"
        ) from error
    return target


def load(encoder: nn.Module, params: Tensors, batch_stats: Tensors, tensors: Tensors, source: str) -> Loaded:
    """Returns an encoder's variables with published weights in place of those that were drawn.

    What makes tokens of the cells (`tokens`, or `project` and `norm`) keeps the values it has. Kernels and stored
    statistics are laid out anew; kernels of three input channels are added up for images of one channel, and repeated
    for others, times 3 over their number, as timm does; a square grid of position embeddings is resized, as timm does.

    Args:
      encoder: the module.
      params, batch_stats: its variables, nested.
      tensors: name -> array, see `read`.
      source: where they are from, for messages.

    Raises:
      UserError: no weights are known for this encoder, a tensor is left over or missing, or one has another shape.
    """
    family = next((rules for kind, rules in FAMILIES.items() if isinstance(encoder, kind)), None)
    if family is None:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise UserError(f"init={source!r}: published weights are known for {known}, not {type(encoder).__name__}")
    ours: dict[str, dict[str, Any]] = {
        "params": flax.traverse_util.flatten_dict(dict(params), sep="/"),
        "batch_stats": flax.traverse_util.flatten_dict(dict(batch_stats), sep="/"),
    }
    own = unpublished(params)
    rules, droppable = family(tensors)
    patterns = [
        (re.compile(rf"(?:{pattern})(?:[._](?P<leaf>{'|'.join(LEAVES)}))?"), target) for pattern, target in rules
    ]
    filled: dict[tuple[str, str], np.ndarray] = {}
    left_out, unknown = [], []
    for name, tensor in tensors.items():
        places = _places(name, patterns, ours)
        if places:
            for place, part in zip(places, np.split(tensor, len(places)) if len(places) > 1 else [tensor], strict=True):
                if place in filled:
                    raise UserError(f"init={source!r}: {name!r} is a second tensor for {place[1]}")
                filled[place] = _fitted(part, ours[place[0]][place[1]], place[1], name, source)
        elif re.fullmatch(rf"(\w+\.)?({droppable})(\..*)?|(.*\.)?(num_batches_tracked|position_ids)", name):
            left_out.append(name)
        else:
            unknown.append(name)
    missing = [
        path
        for collection, leaves in ours.items()
        for path in leaves
        if (collection, path) not in filled and path.partition("/")[0] not in own
    ]
    if unknown or missing:
        said = [f"{len(unknown)} left over: {', '.join(unknown)}"] * bool(unknown)
        said += [f"{len(missing)} that the encoder has are not there: {', '.join(missing)}"] * bool(missing)
        raise UserError(f"init={source!r} does not fit {type(encoder).__name__}: of its tensors {'; '.join(said)}")
    for (collection, path), value in filled.items():
        ours[collection][path] = value
    nested = {name: flax.traverse_util.unflatten_dict(leaves, sep="/") for name, leaves in ours.items()}
    return Loaded(nested["params"], nested["batch_stats"], left_out)


def _places(
    name: str, patterns: list[tuple[re.Pattern, str]], ours: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    """Returns the (collection, path) of ours that a published tensor fills: several where it is cut in parts."""
    for pattern, target in patterns:
        if not (match := pattern.fullmatch(name)):
            continue
        ends = [f"/{end}" for end in LEAVES[match["leaf"]]] if match["leaf"] else [""]
        places = [
            (collection, f"{path}{end}")
            for path in match.expand(target).split("+")
            for end in ends
            for collection, leaves in ours.items()
            if f"{path}{end}" in leaves
        ]
        if places:
            return places
    return []


def _fitted(tensor: np.ndarray, ours: Any, path: str, name: str, source: str) -> np.ndarray:
    """Returns a published tensor laid out as ours is."""
    shape, given = np.shape(ours), tensor.shape
    if path.endswith("kernel"):
        if tensor.ndim == 2 and "/fc6/" in f"/{path}":  # flattened with the channels first, ours with them last
            side = 6 if shape[0] % 36 == 0 and shape[0] % 49 else 7
            tensor = tensor.reshape(given[0], -1, side, side)
        if tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)  # [h, w, I, O]
            if len(shape) == 4 and shape[2] != 3 and tensor.shape[2] == 3 and path.startswith(FIRST):
                gray = tensor.sum(axis=2, keepdims=True)
                many = np.resize(tensor.transpose(2, 0, 1, 3), (shape[2], *shape[:2], shape[3])).transpose(1, 2, 0, 3)
                tensor = gray if shape[2] == 1 else many * (3 / shape[2])
            tensor = tensor.reshape(shape) if tensor.size == math.prod(shape) and len(shape) == 2 else tensor
        elif tensor.ndim == 2:
            tensor = tensor.T
    elif path == "positions":  # [1, N, D]
        tensor = tensor[0] if tensor[0].shape == shape else _resized(tensor[0], shape[0])
    elif tensor.size == math.prod(shape):
        tensor = tensor.reshape(shape)
    if tensor.shape != shape:
        raise UserError(f"init={source!r}: {name} is {list(given)}, which does not fit {path} of {list(shape)}")
    return tensor.astype(np.float32)


def _resized(positions: np.ndarray, count: int) -> np.ndarray:
    """Returns the class token's embedding and a square grid's, the grid resized to `count - 1` cells, `[count, D]`."""
    old, new = (math.isqrt(n - 1) for n in (len(positions), count))
    if old**2 != len(positions) - 1 or new**2 != count - 1:
        return positions
    grid = positions[1:].reshape(old, old, -1).astype(np.float32)
    grid = jax.image.resize(grid, (new, new, grid.shape[2]), "bicubic")
    return np.concatenate([positions[:1], np.asarray(grid).reshape(new * new, -1)])


FIRST = ("conv_stem", "conv0_0", "conv1/", "shrink0", "patches")  # layers that read the image
