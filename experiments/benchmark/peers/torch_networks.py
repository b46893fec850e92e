"""The networks of `networks.py` in PyTorch; modules have this package's names, so that its parameters load by path.

B batch · N tokens · T text length · D width
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HEADS = 4


def norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)  # flax's default


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


class Positions(nn.Module):
    """A feature map `[B, C, H, W]` as tokens `[B, H·W, D]` with learned positions."""

    def __init__(self, channels: int, width: int, count: int):
        super().__init__()
        self.project, self.norm = nn.Linear(channels, width), norm(width)
        self.positions = nn.Parameter(0.02 * torch.randn(count, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.project(x.flatten(2).transpose(1, 2)) + self.positions)


class CNN(nn.Module):
    """Convolutions of stride 2 with batch normalisation."""

    def __init__(self, width: int, channels: tuple[int, ...], side: int):
        super().__init__()
        self.depth = len(channels)
        for i, (before, after) in enumerate(zip((3, *channels), channels, strict=False)):
            self.add_module(f"Conv_{i}", nn.Conv2d(before, after, 3, 2, 1))
            self.add_module(f"Norm_{i}", nn.ModuleDict({"batch": nn.BatchNorm2d(after)}))
        self.tokens = Positions(channels[-1], width, (side // 2**self.depth) ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.depth):
            x = gelu(getattr(self, f"Norm_{i}")["batch"](getattr(self, f"Conv_{i}")(x)))
        return self.tokens(x)


class PooledCNN(nn.Module):
    """One 3×3 convolution of 32 channels without padding, 2×2 max pooling and a dense layer: one token."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.Conv_0 = nn.Conv2d(3, 32, 3)
        self.project, self.norm = nn.Linear(32 * ((side - 2) // 2) ** 2, width), norm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.Conv_0(x)), 2)
        return self.norm(self.project(x.permute(0, 2, 3, 1).flatten(1)))[:, None]  # flattened as [H, W, C]


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv_2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm_1, self.norm_2 = (nn.ModuleDict({"batch": nn.BatchNorm2d(after)}) for _ in range(2))
        self.skips = before != after
        if self.skips:
            self.conv_skip = nn.Conv2d(before, after, 1, stride, bias=False)
            self.norm_skip = nn.ModuleDict({"batch": nn.BatchNorm2d(after)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.norm_1["batch"](self.conv_1(x)))
        out = self.norm_2["batch"](self.conv_2(out))
        return F.relu(out + (self.norm_skip["batch"](self.conv_skip(x)) if self.skips else x))


class ResNet18(nn.Module):
    """With the stem for small images."""

    def __init__(self, width: int, side: int):
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.norm_stem = nn.ModuleDict({"batch": nn.BatchNorm2d(64)})
        for stage, channels in enumerate((64, 128, 256, 512)):
            before = channels if stage == 0 else channels // 2
            self.add_module(f"stage{stage}_block0", Residual(before, channels, 1 if stage == 0 else 2))
            self.add_module(f"stage{stage}_block1", Residual(channels, channels, 1))
        self.tokens = Positions(512, width, (side // 8) ** 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm_stem["batch"](self.conv_stem(x)))
        for stage in range(4):
            x = getattr(self, f"stage{stage}_block1")(getattr(self, f"stage{stage}_block0")(x))
        return self.tokens(x)


class Recurrent(nn.Module):
    """Embedding, an LSTM or a GRU of 64 units; all states, or that of the last token, projected."""

    def __init__(self, width: int, vocabulary: int, embedding: int, last: bool = False, cell: str = "lstm"):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        self.forward_0 = (nn.LSTM if cell == "lstm" else nn.GRU)(embedding, 64, batch_first=True)
        if cell == "lstm":  # PyTorch has two biases that are added: as one that learns, they are flax's
            self.forward_0.bias_ih_l0.requires_grad_(False)
        self.project, self.norm, self.last = nn.Linear(64, width), norm(width), last

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states, _ = self.forward_0(self.embed(ids))
        if self.last:
            states = states[torch.arange(len(ids)), mask.sum(1) - 1][:, None]
            return self.norm(self.project(states))
        return self.norm(self.project(states) * mask[..., None]) * mask[..., None]


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(2, (HEADS, -1)).transpose(1, 2)  # [B, h, N, D/h]

        keep = None if mask is None else mask[:, None, None]
        out = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(keys)), split(self.value(keys)), keep)
        return self.out(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, ratio: int = 2, context: bool = True):
        super().__init__()
        self.norm, self.norm_mlp, self.attention = norm(width), norm(width), Attention(width)
        if context:
            self.norm_context = norm(width)
        self.mlp_in, self.mlp_out = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        queries = self.norm(x)
        x = x + self.attention(queries, queries if context is None else self.norm_context(context), mask)
        return x + self.mlp_out(gelu(self.mlp_in(self.norm_mlp(x))))


class TextTransformer(nn.Module):
    def __init__(self, width: int, vocabulary: int, length: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        rates = 10_000.0 ** (-np.arange(32) / 32)
        angles = np.arange(length)[:, None] * rates
        places = np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
        self.register_buffer("places", torch.from_numpy(places), persistent=False)
        self.block0, self.block1 = (Block(64, 4, context=False) for _ in range(2))
        self.project, self.norm = nn.Linear(64, width), norm(width)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * math.sqrt(64) + self.places
        x = self.block1(self.block0(x, mask=mask), mask=mask)
        return self.norm(self.project(x) * mask[..., None]) * mask[..., None]


def mean_max(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.cat([x.mean(1), x.amax(1)], -1)
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.cat([mean, x.masked_fill(~mask[..., None], -math.inf).amax(1)], -1)


class Concat(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.Dense_0 = nn.Linear(2 * width, width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mean = (text * mask[:, : text.shape[1], None]).sum(1) / mask[:, : text.shape[1]].sum(1, keepdim=True)
        return gelu(self.Dense_0(torch.cat([image.mean(1), mean], -1)))


class Alone(nn.Module):
    """One modality's tokens, averaged, and a dense layer."""

    modality = "image"

    def __init__(self, width: int):
        super().__init__()
        self.Dense_0 = nn.Linear(width, width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return gelu(self.Dense_0((image if self.modality == "image" else text).mean(1)))


class CoAttention(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = layers
        for i in range(layers):
            self.add_module(f"layer{i}_image", Block(width))
            self.add_module(f"layer{i}_text", Block(width))
        self.norm_image, self.norm_text, self.out = norm(width), norm(width), nn.Linear(4 * width, width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for i in range(self.layers):
            updated = getattr(self, f"layer{i}_image")(image, text, mask)
            image, text = updated, getattr(self, f"layer{i}_text")(text, image)
            text = text * mask[..., None]
        pooled = [mean_max(self.norm_image(image), None), mean_max(self.norm_text(text), mask)]
        return gelu(self.out(torch.cat(pooled, -1)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, width))
        self.layers = layers
        for i in range(layers):
            self.add_module(f"layer{i}", Block(width))
        self.norm, self.out = norm(width), nn.Linear(2 * width, width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.token.expand(len(image), 1, -1), image], 1)
        for i in range(self.layers):
            x = getattr(self, f"layer{i}")(x, text, mask)
        return gelu(self.out(mean_max(self.norm(x), None)))


class Network(nn.Module):
    """Encoders of an image and a text, fused, with a head."""

    def __init__(self, name: str, side: int, length: int, vocabulary: int, classes: int, **_: float):
        super().__init__()
        width = 128 if name == "article" else 64
        if name == "article":
            self.encoders_image, self.fusion = PooledCNN(width, side), Concat(width)
            self.encoders_text = Recurrent(width, vocabulary, 32, last=True)
        elif name == "resnet18":
            self.encoders_image, self.fusion = ResNet18(width, side), CrossAttention(width, 2)
            self.encoders_text = TextTransformer(width, vocabulary, length)
        else:
            small = name == "quickstart"
            self.encoders_image = CNN(width, (16, 32, 64) if small else (32, 64, 64), side)
            self.encoders_text = Recurrent(width, vocabulary, 32 if small else 64)
            self.fusion = CoAttention(width, 1 if small else 2)
        self.heads_label = nn.Linear(width, classes)

    def forward(self, image: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns logits `[B, classes]` of images uint8 `[B, 3, H, W]`, ids `[B, T]` and their mask."""
        image = (image.float() / 255 - 0.5) / 0.25
        return self.heads_label(self.fusion(self.encoders_image(image), self.encoders_text(text, mask), mask))


@torch.no_grad()
def load(module: nn.Module, parameters: Mapping[str, np.ndarray], prefix: str = "") -> None:
    """Copies this package's parameters into a module that has its names.

    Raises:
      ValueError: a parameter or a module has no counterpart.
    """
    used: set[str] = set()

    def value(path: str, *axes: int) -> torch.Tensor:
        used.add(path)
        array = parameters[path]
        return torch.from_numpy(np.ascontiguousarray(array.transpose(axes) if axes else array))

    for name, one in module.named_modules():
        path = prefix + name.replace(".", "/") + ("/" if name else "")
        for own, parameter in one.named_parameters(recurse=False):
            if isinstance(one, nn.Conv2d) and own == "weight":
                found = value(path + "kernel", 3, 2, 0, 1)
            elif isinstance(one, nn.Linear) and own == "weight":
                found = value(path + "kernel", 1, 0)
            elif isinstance(one, nn.LSTM | nn.GRU):
                found = _recurrent(value, path, own, isinstance(one, nn.LSTM), parameters)
            else:
                renamed = isinstance(one, nn.LayerNorm | nn.BatchNorm2d | nn.Embedding) and own == "weight"
                found = value(path + (("embedding" if isinstance(one, nn.Embedding) else "scale") if renamed else own))
            parameter.copy_(found)
        if isinstance(one, nn.BatchNorm2d) and path + "mean" in parameters:
            one.running_mean.copy_(value(path + "mean"))
            one.running_var.copy_(value(path + "var"))
    if unused := parameters.keys() - used:
        raise ValueError(f"no module for {sorted(unused)}")


def _recurrent(value, path: str, own: str, lstm: bool, parameters: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Returns the four or three gates of an LSTM or a GRU as one of PyTorch's arrays."""
    gates, side = ("ifgo" if lstm else "rzn"), "i" if "_ih_" in own else "h"
    parts = []
    for gate in gates:
        name = f"{path}{side}{gate}/" + ("kernel" if "weight" in own else "bias")
        if name in parameters:
            parts.append(value(name, 1, 0) if "weight" in own else value(name))
        else:  # of PyTorch's two biases, flax has one
            parts.append(torch.zeros(64))
    return torch.cat(parts)
