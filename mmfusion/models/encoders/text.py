"""Text encoders on token ids: mean token embedding, convolutions and recurrent networks, which also read vectors.

B batch · T time (token ids; 0 is padding, 1 out of vocabulary) · F features of a vector · D width
"""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, masked_max, masked_mean, normalised_tokens, zero_masked

CELLS = {"vanilla": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}


def embed(x: jax.Array, mask: jax.Array, vocabulary: int, width: int, dtype: Any) -> jax.Array:
    """Returns embeddings `[B, T, width]` of token ids `[B, T]`, or of vectors `[B, T, F]` if `vocabulary` is 0.

    Those of vectors are a linear layer. Call it in a compact method.
    """
    if vocabulary:
        return nn.Embed(vocabulary, width, dtype=dtype, name="embed")(jnp.where(mask, x, 0))
    return nn.Dense(width, dtype=dtype, name="embed")(zero_masked(x, mask).astype(dtype))


class BagOfWords(nn.Module):
    """Mean of token embeddings over the unmasked positions.

    Without a dense layer it is equivalent to a linear bag-of-words model: a bias-free linear layer on token counts
    outputs the sum of the embeddings, which equals their mean after the final normalisation.

    Attributes:
      width: width D of the tokens.
      vocabulary: number of token ids.
      tokens: `mean` outputs one token, the masked mean; `all` outputs the T embeddings.
      dense: units of a dense layer on the output; 0: none.
      dropout: dropout rate after the dense layer, or of the embeddings without it.
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
            raise UserError("unknown value", path="bow.tokens", value=self.tokens, choices=("mean", "all"))
        embeddings = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        if not self.dense:
            embeddings = Dropout(self.dropout)(embeddings, train=train)  # [B, T, D]
        if self.tokens == "mean":
            embeddings, mask = masked_mean(embeddings, mask)[:, None], mask.any(axis=1, keepdims=True)  # [B, 1, D]
        if self.dense:
            embeddings = nn.relu(nn.Dense(self.dense, dtype=self.dtype, name="dense")(embeddings))
            embeddings = Dropout(self.dropout)(embeddings, train=train)
            embeddings = nn.Dense(self.width, dtype=self.dtype, name="project")(embeddings)
        return normalised_tokens(embeddings, mask, self.dtype), mask


class TextCNN(nn.Module):
    """Convolutions of several widths over token embeddings with max-over-time pooling (Kim 2014, arXiv:1408.5882).

    Attributes:
      width: width D of the tokens.
      vocabulary: number of token ids.
      embedding: width of the token embeddings.
      kernels: kernel sizes, tokens.
      channels: channels per kernel size.
      tokens: `max` outputs one token, the maxima; `all` outputs the features of the windows at the T positions.
      dropout: dropout rate of the maxima, or of each position.
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
            raise UserError("unknown value", path="textcnn.tokens", value=self.tokens, choices=("max", "all"))
        embeddings = nn.Embed(self.vocabulary, self.embedding, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0))
        embeddings = zero_masked(embeddings, mask)[:, :, None]  # [B, T, 1, embedding]
        feature_maps = []
        for size in self.kernels:
            padded = jnp.pad(embeddings, ((0, 0), (0, size - 1), (0, 0), (0, 0)))
            layer = conv(self.channels, (size, 1), 1, self.dtype, padding=0, name=f"conv{size}")
            feature_maps.append(nn.relu(layer(padded)[:, :, 0]))  # [B, T, channels], windows start at each position
        features = jnp.concatenate(feature_maps, axis=-1)
        if self.tokens == "max":
            features, mask = masked_max(features, mask)[:, None], mask.any(axis=1, keepdims=True)
        features = nn.Dense(self.width, dtype=self.dtype, name="project")(Dropout(self.dropout)(features, train=train))
        return normalised_tokens(features, mask, self.dtype), mask


class RNN(nn.Module):
    """Recurrent network over token embeddings: vanilla (Elman 1990), GRU (Cho et al. 2014, arXiv:1406.1078) or LSTM.

    It also reads sequences of vectors, which a linear layer embeds; masked positions are skipped.

    Attributes:
      width: width D of the tokens.
      vocabulary: number of token ids; 0: vectors.
      cell: `vanilla`, `gru` or `lstm`.
      layers: number of recurrent layers.
      bidirectional: whether each layer concatenates the outputs of a forward and a backward scan.
      embedding: width of the embeddings.
      hidden: units of each layer and direction.
      tokens: `all` outputs all T positions; `last` outputs one token, the last output of each direction.
      dropout: dropout rate of the embeddings and between layers.
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

    reads: ClassVar = ("text", "sequence")
    layer_order: ClassVar = ("embed", r"(forward|backward)_\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` with `mask [B, T]` (a prefix), or vectors `[B, T, F]` with any mask, as tokens and mask.

        The tokens are `[B, T or 1, D]`.

        Raises:
          UserError: `cell` or `tokens` is unknown, or `layers` is below 1.
        """
        if self.cell not in CELLS:
            raise UserError("unknown value", path="rnn.cell", value=self.cell, choices=CELLS)
        if self.tokens not in ("all", "last"):
            raise UserError("unknown value", path="rnn.tokens", value=self.tokens, choices=("all", "last"))
        if self.layers < 1:
            raise UserError("must be at least 1", path="rnn.layers", value=self.layers)
        lengths = mask.sum(axis=1)  # [B]
        hidden_states = embed(x, mask, self.vocabulary, self.embedding, self.dtype)
        order = None if self.vocabulary else jnp.argsort(~mask, axis=1, stable=True)  # unmasked positions first
        if order is not None:
            hidden_states = jnp.take_along_axis(hidden_states, order[..., None], axis=1)
        for layer in range(self.layers):
            hidden_states = Dropout(self.dropout)(hidden_states, train=train)
            outputs = [self._scan(hidden_states, lengths, f"forward_{layer}", reverse=False)]
            if self.bidirectional:
                outputs.append(self._scan(hidden_states, lengths, f"backward_{layer}", reverse=True))
            hidden_states = jnp.concatenate(outputs, axis=-1)  # [B, T, hidden · directions]
        project = nn.Dense(self.width, dtype=self.dtype, name="project")
        if self.tokens == "all":
            if order is not None:
                hidden_states = jnp.take_along_axis(hidden_states, jnp.argsort(order, axis=1)[..., None], axis=1)
            return normalised_tokens(project(hidden_states), mask, self.dtype), mask
        # The backward scan ends at the first token.
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        ends = [jnp.take_along_axis(outputs[0], last, axis=1), *(output[:, :1] for output in outputs[1:])]
        present = mask.any(axis=1, keepdims=True)  # [B, 1]
        return normalised_tokens(project(jnp.concatenate(ends, axis=-1)), present, self.dtype), present  # [B, 1, D]

    def _scan(self, hidden_states: jax.Array, lengths: jax.Array, name: str, *, reverse: bool) -> jax.Array:
        cell = CELLS[self.cell](self.hidden, dtype=self.dtype, name=name)
        scan = nn.RNN(cell, reverse=reverse, keep_order=True, name=f"scan_{name}")
        return cast(jax.Array, scan(hidden_states, seq_lengths=lengths))  # [B, T, hidden]
