"""Text encoders: a bag of word embeddings, convolutions and recurrent networks over token ids.

B batch · T time (token ids; 0 is padding, 1 out of vocabulary) · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, masked_max, masked_mean, normalised_tokens, zero_masked

CELLS = {"vanilla": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


class BagOfWords(nn.Module):
    """Word embeddings, averaged over the real positions.

    A linear layer without a bias over a text's counts of words (a bag of words) is their sum, the same once it is
    normalised, where there is no dense layer between.

    Attributes:
      width: token width D.
      vocabulary: how many token ids there are.
      tokens: `mean` returns one token, the masked mean; `all` returns the T embeddings.
      dense: units of a dense layer over what is returned; 0: there is none.
      dropout: rate on that layer's units, or, without it, on the embeddings.
    """

    width: int
    vocabulary: int
    tokens: str = "mean"
    dense: int = 0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = ("embed", "norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` as tokens `[B, 1 or T, D]` and their mask.

        Raises:
          UserError: `tokens` is unknown.
        """
        if self.tokens not in ("mean", "all"):
            raise UserError(f"bow: tokens={self.tokens!r} is unknown; choose mean or all")
        words = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        if not self.dense:
            words = Dropout(self.dropout)(words, train=train)  # [B, T, D]
        if self.tokens == "mean":
            words, mask = masked_mean(words, mask)[:, None], mask.any(axis=1, keepdims=True)  # [B, 1, D]
        if self.dense:
            words = nn.relu(nn.Dense(self.dense, dtype=self.dtype, name="dense")(words))
            words = nn.Dense(self.width, dtype=self.dtype, name="project")(Dropout(self.dropout)(words, train=train))
        return normalised_tokens(words, mask, self.dtype), mask


class TextCNN(nn.Module):
    """Convolutions of several widths over word embeddings, the maximum over time of each (Kim 2014, arXiv:1408.5882).

    Attributes:
      width: token width D.
      vocabulary: how many token ids there are.
      embedding: width of the word embeddings.
      kernels: words that a convolution of each width reads.
      channels: channels of each width.
      tokens: `max` returns one token, the maxima; `all` what starts at each of the T positions.
      dropout: rate on the maxima, or on each position.
    """

    width: int
    vocabulary: int
    embedding: int = 64
    kernels: tuple[int, ...] = (3, 4, 5)
    channels: int = 64
    tokens: str = "max"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` (a prefix) as tokens `[B, 1 or T, D]` and their mask.

        Raises:
          UserError: `tokens` is unknown.
        """
        if self.tokens not in ("max", "all"):
            raise UserError(f"textcnn: tokens={self.tokens!r} is unknown; choose max or all")
        words = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        words = zero_masked(words, mask)[:, :, None]  # [B, T, 1, embedding]
        each = []
        for size in self.kernels:
            padded = jnp.pad(words, ((0, 0), (0, size - 1), (0, 0), (0, 0)))
            layer = conv(self.channels, (size, 1), 1, self.dtype, padding=0, name=f"conv{size}")
            each.append(nn.relu(layer(padded)[:, :, 0]))  # [B, T, channels], of the words from each position on
        read = jnp.concatenate(each, axis=-1)
        if self.tokens == "max":
            read, mask = masked_max(read, mask)[:, None], mask.any(axis=1, keepdims=True)
        read = nn.Dense(self.width, dtype=self.dtype, name="project")(Dropout(self.dropout)(read, train=train))
        return normalised_tokens(read, mask, self.dtype), mask


class RNN(nn.Module):
    """A recurrent network over word embeddings: vanilla (Elman 1990), GRU (Cho et al. 2014, arXiv:1406.1078) or LSTM.

    Attributes:
      width: token width D.
      vocabulary: how many token ids there are.
      cell: `vanilla`, `gru` or `lstm`.
      layers: recurrent layers.
      bidirectional: each layer reads both ways, its two outputs concatenated.
      embedding: width of the word embeddings.
      hidden: units of a layer in one direction.
      tokens: `all` returns the output at each of the T positions; `last` one token, each direction's last output.
      dropout: rate on the embeddings and between layers.
    """

    width: int
    vocabulary: int
    cell: str = "lstm"
    layers: int = 1
    bidirectional: bool = False
    embedding: int = 64
    hidden: int = 64
    tokens: str = "all"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = ("embed", r"(forward|backward)_\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` (a prefix) as tokens `[B, T or 1, D]` and their mask.

        Raises:
          UserError: `cell` or `tokens` is unknown, or `layers` is below 1.
        """
        if self.cell not in CELLS:
            raise UserError(f"rnn: cell={self.cell!r} is unknown; choose {', '.join(CELLS)}")
        if self.tokens not in ("all", "last"):
            raise UserError(f"rnn: tokens={self.tokens!r} is unknown; choose all or last")
        if self.layers < 1:
            raise UserError(f"rnn: layers={self.layers} must be at least 1")
        lengths = mask.sum(axis=1)  # [B]
        words = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        for layer in range(self.layers):
            words = Dropout(self.dropout)(words, train=train)
            ways = [self._scan(words, lengths, f"forward_{layer}", reverse=False)]
            if self.bidirectional:
                ways.append(self._scan(words, lengths, f"backward_{layer}", reverse=True))
            words = jnp.concatenate(ways, axis=-1)  # [B, T, hidden · directions]
        project = nn.Dense(self.width, dtype=self.dtype, name="project")
        if self.tokens == "all":
            return normalised_tokens(project(words), mask, self.dtype), mask
        # The backward scan ends on the first word.
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        ends = [jnp.take_along_axis(ways[0], last, axis=1), *(way[:, :1] for way in ways[1:])]
        some = mask.any(axis=1, keepdims=True)  # [B, 1]
        return normalised_tokens(project(jnp.concatenate(ends, axis=-1)), some, self.dtype), some  # [B, 1, D]

    def _scan(self, words: jax.Array, lengths: jax.Array, name: str, *, reverse: bool) -> jax.Array:
        cell = CELLS[self.cell](self.hidden, dtype=self.dtype, name=name)
        scan = nn.RNN(cell, reverse=reverse, keep_order=True, name=f"scan_{name}")
        return cast(jax.Array, scan(words, seq_lengths=lengths))  # [B, T, hidden]
