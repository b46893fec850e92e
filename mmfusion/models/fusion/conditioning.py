"""Conditioning of one modality's tokens on the others: FiLM, the non-local gate, the multimodal adaptation gate.

A learned token is prepended to the main modality's, so that the other modalities contribute when it is absent.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.fusion.contract import Declaration, Fused, project_each
from mmfusion.models.fusion.sequence import concatenate_tokens, pooled_features, split_weights, with_learned_token
from mmfusion.models.layers import Attention, masked_mean, zero_masked


def choose_main(strategy: str, main: str, names: Iterable[str]) -> tuple[str, list[str]]:
    """Returns the main modality (`main`, or the first in sorted order if it is empty) and the others.

    Raises:
      UserError: `main` is not a modality of the model.
    """
    names = sorted(names)
    if main and main not in names:
        raise UserError("no modality of this model", path=f"{strategy}.main", value=main, choices=names)
    main = main or names[0]
    return main, [m for m in names if m != main]


class FiLM(nn.Module):
    """FiLM: residual blocks on the main modality's tokens, conditioned on the others (Perez et al. 2018).

    arXiv:1709.07871. In each block u = GELU(W h) and h' = u + GELU(γ ⊙ LN(V u) + β), with (γ - 1, β) an affine map of
    c = GELU(Σ_{o in P} C_o x_o + d_o). GELU and layer norm replace the paper's ReLU and batch norm.

    Attributes:
      width: width D of tokens and features.
      blocks: number of residual blocks.
      kernel: kernel size of V: 1 is pointwise; 3, the paper's, convolves over a square grid of tokens.
      main: the conditioned modality; empty: the first in sorted order.
    """

    width: int
    blocks: int = 2
    kernel: int = 1
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1709.07871", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `main` is not a modality of the model, its tokens form no square grid for `kernel` above 1, or
            `kernel` is even.
        """
        del train
        if self.kernel % 2 == 0:
            message = "must be odd, so that each token is at its centre"
            raise UserError(message, path="film.kernel", value=self.kernel)
        main, others = choose_main("film", self.main, tokens)
        count = tokens[main].shape[1]
        if self.kernel > 1 and math.isqrt(count) ** 2 != count:
            raise UserError(
                f"needs a square grid of tokens, and {main} has {count}; choose 1",
                path="film.kernel",
                value=self.kernel,
            )

        def dense(width: int, x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(width, dtype=self.dtype, name=name)(x)

        h, h_mask = with_learned_token(self, tokens[main], mask[main])
        projected = project_each(
            others, [masked_mean(tokens[m], mask[m]) for m in others], self.width, self.dtype, "condition"
        )
        condition = sum(zero_masked(x, mask[m].any(axis=1)) for m, x in zip(others, projected, strict=True))
        for block in range(self.blocks):
            u = nn.gelu(dense(self.width, h, f"block{block}_in"))
            hidden = self._convolved(zero_masked(u, h_mask), f"block{block}_out")
            hidden = nn.LayerNorm(
                use_scale=not others, use_bias=not others, dtype=self.dtype, name=f"block{block}_norm"
            )(hidden)
            if others:
                film = dense(2 * self.width, nn.gelu(condition), f"block{block}_film")[:, None]  # [B, 1, 2D]
                hidden = (1 + film[..., : self.width]) * hidden + film[..., self.width :]
            h = u + nn.gelu(hidden)
        return Fused(features=pooled_features(h, h_mask, self.width, self.dtype), attention={})

    def _convolved(self, tokens: jax.Array, name: str) -> jax.Array:
        """Convolves the first of the tokens `[B, 1 + N, D]`, as a 1×1 grid, and the square grid of the others."""
        if self.kernel == 1:
            return nn.Dense(self.width, dtype=self.dtype, name=name)(tokens)
        convolution = conv(self.width, self.kernel, 1, self.dtype, name=name)
        batch_size, side = tokens.shape[0], math.isqrt(tokens.shape[1] - 1)
        grids = convolution(tokens[:, :1, None]), convolution(tokens[:, 1:].reshape(batch_size, side, side, -1))
        return jnp.concatenate([grid.reshape(batch_size, -1, self.width) for grid in grids], axis=1)


class NLGate(nn.Module):
    """Non-local gate: the main modality's tokens plus attention to the others (Wang et al. 2018, arXiv:1711.07971).

    y_i = x_i + W softmax_j(θ(x_i) · φ(z_j) / √(D / heads)) g(z_j), with z the tokens of the other modalities, or of the
    main modality if it is the only one.

    Attributes:
      width: width D of tokens and features.
      heads: attention heads; divides `width`.
      main: the modality of the queries; empty: the first in sorted order.
    """

    width: int
    heads: int = 1
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1711.07971", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are from the main modality's tokens, without the learned token, to each other
        modality's.

        Raises:
          UserError: `main` is not a modality of the model, or `heads` does not divide `width`.
        """
        main, others = choose_main("nl_gate", self.main, tokens)
        keys = others or [main]
        x, x_mask = with_learned_token(self, tokens[main], mask[main])
        context, context_mask, sizes = concatenate_tokens(tokens, mask, keys)
        attention = Attention(heads=self.heads, width=self.width, dtype=self.dtype, name="attention")
        attended, weights = attention(x, context, context_mask)
        weights = jnp.where(x_mask[:, None, :, None], weights, 0.0)[:, :, 1:]  # [B, h, N, Nk], no learned token
        return Fused(
            features=pooled_features(x + attended, x_mask, self.width, self.dtype),
            attention=split_weights(weights, [main], [tokens[main].shape[1]], keys, sizes),
        )


class MAG(nn.Module):
    """Multimodal adaptation gate: the others shift the main modality's tokens (Rahman et al. 2020, arXiv:1908.05787).

    g_o = ReLU(G_o [z; x_o] + b_o), H = Σ_o g_o ⊙ (W_o x_o), z' = LN(z + min(β |z| / |H|, 1) H). Here x_o is the mean of
    the other modality's tokens, because tokens are not aligned. H lacks the paper's bias, so that an absent modality
    shifts nothing.

    Attributes:
      width: width D of tokens and features.
      beta: maximum norm of the shift of a token, relative to the norm of the token.
      main: the shifted modality; empty: the first in sorted order.
    """

    width: int
    beta: float = 1.0
    main: str = ""
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="conditioning", paper="arXiv:1908.05787", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `main` is not a modality of the model.
        """
        del train
        main, others = choose_main("mag", self.main, tokens)
        z, z_mask = with_learned_token(self, tokens[main], mask[main])
        shift = 0.0
        for m in others:
            x = jnp.broadcast_to(masked_mean(tokens[m], mask[m])[:, None], z.shape)  # [B, 1 + N, D]
            gate = nn.relu(nn.Dense(self.width, dtype=self.dtype, name=f"gate_{m}")(jnp.concatenate([z, x], axis=-1)))
            gated_shift = gate * nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=f"project_{m}")(x)
            shift = shift + zero_masked(gated_shift, mask[m].any(axis=1))
        if others:
            norms = [jnp.sqrt(jnp.square(vector).sum(-1, keepdims=True) + 1e-6) for vector in (z, shift)]
            z = z + jnp.minimum(self.beta * norms[0] / norms[1], 1.0) * shift
        z = nn.LayerNorm(dtype=self.dtype, name="norm")(z)
        return Fused(features=pooled_features(z, z_mask, self.width, self.dtype), attention={})
