"""Transformers over token ids, vectors, and patches of a spectrogram.

B batch · T time (token ids; 0 is padding) · S audio samples · F mel bands or features of a vector · N tokens · D width
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
from mmfusion.models.encoders.text import embed
from mmfusion.models.layers import Dropout, TransformerBlock, normalised_tokens, zero_masked


def sinusoids(length: int, width: int) -> np.ndarray:
    """Returns sinusoidal position embeddings `[length, width]`: sines, then cosines, of wavelengths 2π to 10,000 · 2π.

    They extend to any length (Vaswani et al. 2017, arXiv:1706.03762).
    """
    rates = 10_000.0 ** (-np.arange(math.ceil(width / 2)) / max(width / 2, 1))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width].astype(np.float32)


class TextTransformer(nn.Module):
    """Pre-norm transformer on token and sinusoidal position embeddings (arXiv:1706.03762, 2002.04745).

    It also reads sequences of vectors, which a linear layer embeds.

    Attributes:
      width: width D of the output tokens.
      vocabulary: number of token ids; 0: vectors.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate of the embeddings and the residual branches.
    """

    width: int
    vocabulary: int
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar = ("text", "sequence")
    layer_order: ClassVar = ("embed", r"block\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` or vectors `[B, T, F]` with `mask [B, T]` as tokens `[B, T, D]` and their mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        hidden = embed(x, mask, self.vocabulary, self.hidden, self.dtype)
        scale = math.sqrt(self.hidden) if self.vocabulary else 1.0  # token embeddings have variance 1 / hidden
        hidden = hidden * scale + jnp.asarray(sinusoids(x.shape[1], self.hidden), self.dtype)
        hidden = Dropout(self.dropout)(hidden, train=train)  # [B, T, hidden]
        for layer in range(self.layers):
            block = TransformerBlock(self.heads, self.hidden, 4.0, self.dropout, self.dtype, name=f"block{layer}")
            hidden, _ = block(hidden, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(hidden), mask, self.dtype), mask


class SpectrogramTransformer(nn.Module):
    """Transformer on square patches of a log-mel spectrogram, after AST (Gong et al. 2021, arXiv:2104.01778).

    AST has overlapping patches and learned position embeddings. Here patches do not overlap, and a learned band
    embedding is added to a sinusoidal time embedding, which extends to longer recordings. There is no class token.

    Attributes:
      width: width D of the output tokens.
      rate: sampling rate, Hz.
      mels: number of mel bands; a multiple of `patch`.
      patch: side of the patches, frames and bands.
      frame_ms: frame length, milliseconds.
      hop_ms: hop between frame starts, milliseconds.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate of the patch embeddings and the residual branches.
      mask_frames, mask_bands: maximum frames and bands of the spans masked by `SpecAugment`; 0: none.
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
        """Encodes float32 waveforms `[B, S]` with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and mask `[B, N]`.

        A patch is unmasked if its first frame is. Tokens are ordered by time, then by band.

        Raises:
          UserError: `patch` does not divide `mels`, or `heads` does not divide `hidden`.
        """
        if self.mels % self.patch:
            raise UserError(f"does not divide mels={self.mels}; choose a divisor", path="ast.patch", value=self.patch)
        hop = round(self.rate * self.hop_ms / 1000)
        spectrum = log_mel(
            zero_masked(x, mask), self.rate, mels=self.mels, frame_ms=self.frame_ms, hop_ms=self.hop_ms
        )  # [B, T, F]
        frame_mask = mask[:, ::hop]  # [B, T]
        spectrum = SpecAugment(self.mask_frames, self.mask_bands)(
            standardize(spectrum, frame_mask), frame_mask, train=train
        )
        patches = spectrum[..., None].astype(self.dtype)
        padding = -patches.shape[1] % self.patch
        patches = jnp.pad(patches, ((0, 0), (0, padding), (0, 0), (0, 0)))
        patches = conv(self.hidden, self.patch, self.patch, self.dtype, padding=0, name="patches")(patches)
        batch_size, time_steps, bands = patches.shape[:3]
        band_embedding = self.param("bands", nn.initializers.normal(0.02), (bands, self.hidden)).astype(self.dtype)
        time_embedding = jnp.asarray(sinusoids(time_steps, self.hidden), self.dtype)
        tokens = (patches + band_embedding + time_embedding[:, None]).reshape(
            batch_size, time_steps * bands, self.hidden
        )
        mask = jnp.repeat(frame_mask[:, :: self.patch], bands, axis=1)  # [B, N]
        tokens = Dropout(self.dropout)(zero_masked(tokens, mask), train=train)
        for layer in range(self.layers):
            block = TransformerBlock(self.heads, self.hidden, 4.0, self.dropout, self.dtype, name=f"block{layer}")
            tokens, _ = block(tokens, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(tokens), mask, self.dtype), mask
