"""Transformers over token ids and over patches of a spectrogram.

B batch · T time (token ids; 0 is padding) · S audio samples · F mel bands · N tokens · D width
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.encoders.audio import SpecAugment, log_mel, standardize
from mmfusion.models.layers import Attention, Dropout, TransformerBlock, normalised_tokens, zero_masked


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns `[length, width]`: sines, then cosines, of a place at wavelengths from 2π to 10,000 · 2π.

    They reach any length (Vaswani et al. 2017, arXiv:1706.03762).
    """
    rates = 10_000.0 ** (-np.arange(math.ceil(width / 2)) / max(width / 2, 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)


class TextTransformer(nn.Module):
    """Pre-norm transformer blocks over word embeddings and sinusoids of their places (arXiv:1706.03762, 2002.04745).

    Attributes:
      width: token width D of what is returned.
      vocabulary: how many token ids there are.
      layers: transformer blocks.
      hidden: width within the transformer.
      heads: attention heads; divides `hidden`.
      dropout: rate on the embeddings and the residual branches.
    """

    width: int
    vocabulary: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = ("embed", r"block\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` as tokens `[B, T, D]` and their mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        words = nn.Embed(self.vocabulary, self.hidden, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        words = words * math.sqrt(self.hidden) + jnp.asarray(sinusoids(x.shape[1], self.hidden), self.dtype)
        words = Dropout(self.dropout)(words, train=train)  # [B, T, hidden]
        for layer in range(self.layers):
            block = TransformerBlock(self.heads, self.hidden, 4.0, self.dropout, self.dtype, name=f"block{layer}")
            words, _ = block(words, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(words), mask, self.dtype), mask


class BERTBlock(nn.Module):
    """Post-norm attention and MLP, each with a residual, as published BERT weights have them."""

    heads: int
    mlp: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x [B, T, hidden]` with `mask [B, T]` to the same shape."""
        width = x.shape[-1]
        mixed, _ = Attention(self.heads, width, self.dtype, key_bias=True, name="attention")(x, x, mask)
        x = x + Dropout(self.dropout)(mixed, train=train)
        x = nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm_attention")(x)
        hidden = nn.gelu(nn.Dense(self.mlp, dtype=self.dtype, name="mlp_in")(x), approximate=False)
        hidden = nn.Dense(width, dtype=self.dtype, name="mlp_out")(hidden)
        x = x + Dropout(self.dropout)(hidden, train=train)
        return nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm_mlp")(x)


class BERT(nn.Module):
    """BERT, by default of the base size (Devlin et al. 2019, arXiv:1810.04805).

    Attributes:
      width: token width D of what is returned.
      vocabulary: how many token ids there are.
      layers: transformer blocks.
      hidden: width within the transformer.
      heads: attention heads; divides `hidden`.
      mlp: hidden width of each block's MLP.
      positions: the most tokens a text may have.
      tokens: `all` returns the T positions; `pooled` one token, tanh(W x + b) of the first position.
      dropout: rate on the embeddings and the residual branches (the paper: 0.1).
    """

    width: int
    vocabulary: int
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    mlp: int = 3072
    positions: int = 512
    tokens: str = "all"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = (
        "embed|place|segment|norm_embed",
        r"block\d+",
        "pooler|project|norm",
    )

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` (a prefix) as tokens `[B, T or 1, D]` and their mask.

        All positions are of the first segment.

        Raises:
          UserError: T is above `positions`, `heads` does not divide `hidden`, or `tokens` is unknown.
        """
        if self.tokens not in ("all", "pooled"):
            raise UserError(f"bert: tokens={self.tokens!r} is unknown; choose all or pooled")
        if x.shape[1] > self.positions:
            raise UserError(f"bert: texts of length={x.shape[1]} do not fit positions={self.positions}")

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, self.hidden, dtype=self.dtype, name=name)

        words = table(self.vocabulary, "embed")(jnp.where(mask, x, 0))
        words = words + table(self.positions, "place")(jnp.arange(x.shape[1]))
        words = words + table(2, "segment")(jnp.zeros((), jnp.int32))
        words = zero_masked(nn.LayerNorm(epsilon=1e-12, dtype=self.dtype, name="norm_embed")(words), mask)
        words = Dropout(self.dropout)(words, train=train)  # [B, T, hidden]
        for layer in range(self.layers):
            words = BERTBlock(self.heads, self.mlp, self.dropout, self.dtype, name=f"block{layer}")(
                words, mask, train=train
            )
        if self.tokens == "pooled":
            words, mask = words[:, :1], mask[:, :1]
            words = nn.tanh(nn.Dense(self.hidden, dtype=self.dtype, name="pooler")(words))
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(words), mask, self.dtype), mask


class SpectrogramTransformer(nn.Module):
    """Transformer blocks over square patches of a log-mel spectrogram, after AST (Gong et al. 2021, arXiv:2104.01778).

    AST's patches overlap and have learned places; here they do not, and a place is a learned vector of the band plus
    sinusoids of the time, so that longer recordings fit. There is no class token.

    Attributes:
      width: token width D of what is returned.
      rate: samples a second, Hz.
      mels: mel bands; a multiple of `patch`.
      patch: side of a patch, frames and bands.
      frame_ms: length of a frame, milliseconds.
      hop_ms: from one frame's start to the next one's, milliseconds.
      layers: transformer blocks.
      hidden: width within the transformer.
      heads: attention heads; divides `hidden`.
      dropout: rate on the embedded patches and the residual branches.
      mask_frames, mask_bands: the most frames and bands of each span that `SpecAugment` masks; 0: none.
    """

    width: int
    rate: int
    mels: int = 64
    patch: int = 16
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    mask_frames: int = 0
    mask_bands: int = 0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "audio"
    layer_order: ClassVar = ("patches|bands", r"block\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms `[B, S]` float32 with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and `[B, N]`.

        A patch is real if its first frame is; N counts the bands of the first patches of time, then the next.

        Raises:
          UserError: `patch` does not divide `mels`, or `heads` not `hidden`.
        """
        if self.mels % self.patch:
            raise UserError(f"ast: patch={self.patch} does not divide mels={self.mels}; choose a divisor")
        hop = round(self.rate * self.hop_ms / 1000)
        spectrum = log_mel(
            zero_masked(x, mask), self.rate, mels=self.mels, frame_ms=self.frame_ms, hop_ms=self.hop_ms
        )  # [B, T, F]
        frames = mask[:, ::hop]  # [B, T]
        spectrum = SpecAugment(self.mask_frames, self.mask_bands)(standardize(spectrum, frames), frames, train=train)
        cells = spectrum[..., None].astype(self.dtype)
        short = -cells.shape[1] % self.patch
        cells = jnp.pad(cells, ((0, 0), (0, short), (0, 0), (0, 0)))
        cells = conv(self.hidden, self.patch, self.patch, self.dtype, padding=0, name="patches")(cells)
        rows, times, bands = cells.shape[:3]
        place = self.param("bands", nn.initializers.normal(0.02), (bands, self.hidden)).astype(self.dtype)
        time = jnp.asarray(sinusoids(times, self.hidden), self.dtype)
        tokens = (cells + place + time[:, None]).reshape(rows, times * bands, self.hidden)
        mask = jnp.repeat(frames[:, :: self.patch], bands, axis=1)  # [B, N]
        tokens = Dropout(self.dropout)(zero_masked(tokens, mask), train=train)
        for layer in range(self.layers):
            block = TransformerBlock(self.heads, self.hidden, 4.0, self.dropout, self.dtype, name=f"block{layer}")
            tokens, _ = block(tokens, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(tokens), mask, self.dtype), mask
