"""Layers shared by encoders and fusion strategies: masked reductions, normalisation, per-example dropout, attention.

B batch · N positions · D width · C channels · h heads
"""

import math
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.errors import UserError


def zero_masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `x [B, ..., D]` with zeros, even for NaN, where `mask [B, ...]` (leading axes of x) is False."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, jnp.zeros((), x.dtype))


def masked_mean(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean `[B, D]` over unmasked positions of `tokens [B, N, D]`; zeros if `mask [B, N]` has none."""
    count = jnp.maximum(mask.sum(axis=1), 1).astype(tokens.dtype)  # [B]
    return zero_masked(tokens, mask).sum(axis=1) / count[:, None]  # [B, D]


def masked_max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the maximum `[B, D]` over unmasked positions of `tokens [B, N, D]`; zeros if `mask [B, N]` has none."""
    lowest = jnp.finfo(tokens.dtype).min
    argmax = jnp.argmax(jnp.where(mask[:, :, None], tokens, lowest), axis=1, keepdims=True)  # [B, 1, D]
    # Selected by index: the gradient of `max` compares values, which may be computed twice and rounded differently.
    selected = jnp.arange(tokens.shape[1])[:, None] == argmax  # [B, N, D]
    return zero_masked(jnp.where(selected, tokens, 0).sum(axis=1), mask.any(axis=1))


def masked_softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the float32 softmax of `scores` over the unmasked positions of the last axis (`mask` is broadcast).

    Masked positions are exactly 0, also if no position is unmasked.
    """
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1, where=mask)


def row_keys(module: nn.Module, *, train: bool, rows: int | None = None) -> jax.Array | None:
    """Returns one PRNG key per example `[B]` of a module's input; None in evaluation and in initialisation.

    Args:
      module: the module.
      train: whether this is training.
      rows: the size of the input's first axis, if it may be a multiple of B: an example's images, say, follow one
        another, and each has a key.

    Raises:
      ValueError: the collection `rows` lacks the example ids in training.
    """
    if not train or module.is_initializing():
        return None
    ids = cast(Any, module.scope).root.get_variable("rows", "id")
    if ids is None:
        raise ValueError(
            f"{type(module).__name__} needs the example ids: apply the model with variables "
            '{"params": ..., "rows": {"id": batch.id}} when train=True'
        )
    keys = rng.row_keys(module.make_rng("dropout"), ids)
    if rows in (None, len(ids)):
        return keys
    return jax.vmap(lambda key: jax.random.split(key, rows // len(ids)))(keys).reshape(rows)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, step, module path, example id), not of batch or device.

    The example ids `[B]` are read from the variable collection `rows`: apply the model with
    `{"params": ..., "rows": {"id": batch.id}}` and `rngs={"dropout": key of the step}`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns `x [B, ...]` with elements dropped with probability `rate`, the others scaled by 1 / (1 - rate).

        The first axis may also have several rows per example, one after another.

        Raises:
          ValueError: the collection `rows` lacks the example ids in training.
        """
        keys = row_keys(self, train=train, rows=x.shape[0]) if self.rate > 0 else None
        if keys is None:
            return x
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:]))(keys)  # [B, ...]
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros((), x.dtype))


class BatchNorm(nn.Module):
    """Batch normalisation over the unmasked positions of all devices (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Sums and counts are summed over `axis_name` before the division, so that the result does not depend on how the
    unmasked positions are distributed over devices; flax's BatchNorm averages the devices' means. A batch without an
    unmasked position is normalised with the running statistics, and does not update them.
    """

    axis_name: str | None = None
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `x [B, ..., C]` where `mask` (`[B]` up to `[B, ...]`) is True; zeros elsewhere."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        values = zero_masked(x.astype(jnp.float32), mask)

        mean, var = running_mean.value, running_var.value
        if train and not self.is_initializing():
            positions = math.prod(x.shape[mask.ndim : -1])  # per mask element
            axes = tuple(range(x.ndim - 1))
            sums = (values.sum(axes), jnp.square(values).sum(axes), mask.sum(dtype=jnp.float32) * positions)
            total, squares, count = sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)
            has_positions, divisor = count > 0, jnp.maximum(count, 1.0)
            batch_mean = total / divisor  # [C]
            batch_var = jnp.maximum(squares / divisor - jnp.square(batch_mean), 0.0)  # [C]
            mean, var = jnp.where(has_positions, batch_mean, mean), jnp.where(has_positions, batch_var, var)
            if self.is_mutable_collection("batch_stats"):
                momentum = jnp.where(has_positions, self.momentum, 1.0)
                running_mean.value = momentum * running_mean.value + (1.0 - momentum) * mean
                running_var.value = momentum * running_var.value + (1.0 - momentum) * var

        normalised = (values - mean) * jax.lax.rsqrt(var + self.epsilon) * scale + bias
        return zero_masked(normalised, mask).astype(self.dtype)


def group_norm(x: jax.Array, mask: jax.Array, dtype: Any, name: str) -> jax.Array:
    """Returns `x [B, ..., C]` group-normalised over the unmasked positions of each example; zeros where masked.

    There are up to 32 groups of at least two channels (Wu & He 2018, arXiv:1803.08494). Call it in a compact method.

    Args:
      x: the features.
      mask: the positions to normalise, `[B]` up to `[B, ...]`.
      dtype: dtype of the result.
      name: name of the flax module.
    """
    groups = max(math.gcd(64, x.shape[-1]) // 2, 1)
    # The mean over no position is NaN, so a fully masked example is normalised over its zeros.
    stats_mask = mask | ~mask.any(axis=tuple(range(1, mask.ndim)), keepdims=True)
    stats_mask = jnp.broadcast_to(stats_mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x.shape)
    values = zero_masked(x.astype(jnp.float32), mask)
    return zero_masked(nn.GroupNorm(groups, name=name)(values, mask=stats_mask), mask).astype(dtype)


class Norm(nn.Module):
    """The normalisation named by `kind`: `layer` (over channels), `group`, `batch` or `none`."""

    kind: str
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `x [B, ..., C]` over the positions where `mask` (`[B]` up to `[B, ...]`) is True.

        Raises:
          UserError: `kind` is unknown.
        """
        if self.kind == "layer":
            return nn.LayerNorm(dtype=self.dtype, name="layer")(x)
        if self.kind == "group":
            return group_norm(x, mask, self.dtype, name="group")
        if self.kind == "batch":
            return BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="batch")(x, mask, train=train)
        if self.kind == "none":
            return x
        raise UserError("unknown value", path="norm", value=self.kind, choices=("layer", "group", "batch", "none"))


def head_width(width: int, heads: int) -> int:
    """Returns the width of each head; raises UserError if `heads` does not divide `width`."""
    if width % heads:
        raise UserError(f"does not divide width={width}; choose a divisor of the width", path="heads", value=heads)
    return width // heads


def attention_implementation(query: jax.Array, key: jax.Array) -> Literal["cudnn", "xla", "heads_first"]:
    """Returns which attention suits `query [B, Nq, h, d]` and `key [B, Nk, h, d]`.

    `cudnn` requires a CUDA GPU of compute capability 8.0 or above, half precision, a head width that is a multiple of 8
    and at most 128, and even sequence lengths (with a mask). `heads_first` is for float32 on CPU.
    """
    device = jax.devices()[0]
    if device.platform == "cpu" and query.dtype == jnp.float32:
        return "heads_first"
    capability = getattr(device, "compute_capability", "")  # "9.0" with CUDA, "gfx90a" with ROCm
    if device.platform != "gpu" or not capability[:1].isdigit() or float(capability) < 8:
        return "xla"
    dtype_supported = query.dtype in (jnp.bfloat16, jnp.float16)
    width_supported = query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    lengths_supported = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return "cudnn" if dtype_supported and width_supported and lengths_supported else "xla"


def heads_first_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the attention `[B, Nq, h, d]` to the keys where `mask [B, Nk]` is True; finite if there are none.

    Its matrix products have the heads before the tokens, and the weights are normalised after the product with the
    values. On CPU, `jax.nn.dot_product_attention` takes 1.4 to 3 times as long with its gradient.

    Args:
      query: `[B, Nq, h, d]` float32.
      key, value: `[B, Nk, h, d]` float32.
      mask: the keys to attend to.
    """
    query = query / math.sqrt(query.shape[-1])
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))  # [B, h, N, d]
    # Added rather than selected: its gradient is the identity.
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key) + jnp.where(mask, 0.0, -1e30)[:, None, None, :]
    exponents = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    attended = jnp.einsum("bhqk,bhkd->bhqd", exponents, value) / exponents.sum(axis=-1, keepdims=True)
    return jnp.swapaxes(attended, 1, 2)


def normalised_tokens(tokens: jax.Array, mask: jax.Array, dtype: Any) -> jax.Array:
    """Returns layer-normalised tokens `[B, N, D]`, zeros where masked; the last layer of every encoder.

    This gives the tokens of all modalities unit scale. Otherwise strategies that pool or multiply tokens hardly learn.
    Call it in a compact method.
    """
    return zero_masked(nn.LayerNorm(dtype=dtype, name="norm")(zero_masked(tokens, mask)), mask)


class Attention(nn.Module):
    """Multi-head attention with masked keys (Vaswani et al. 2017, arXiv:1706.03762).

    The output, weights and gradients of an example without an unmasked key are exactly zero.

    Attributes:
      heads: number of heads; divides `width`.
      width: width of the output.
      key_bias: whether keys have a bias, as in published weights. It shifts all scores of a query equally, so it does
        not affect the output and has zero gradient.
    """

    heads: int
    width: int
    dtype: Any = jnp.float32
    key_bias: bool = False

    @nn.compact
    def __call__(self, q_tokens: jax.Array, kv_tokens: jax.Array, kv_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Attends from `q_tokens [B, Nq, D]` to `kv_tokens [B, Nk, D]` where `kv_mask [B, Nk]` is True.

        Returns:
          The output `[B, Nq, width]` and the weights `[B, heads, Nq, Nk]` float32, which the compiler drops if unused.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        head_dim = head_width(self.width, self.heads)

        def split(tokens: jax.Array, name: str) -> jax.Array:
            bias = name != "key" or self.key_bias
            projected = nn.Dense(self.width, use_bias=bias, dtype=self.dtype, name=name)(tokens)
            return projected.reshape(*tokens.shape[:2], self.heads, head_dim)  # [B, N, h, D/h]

        # Masked keys are zeroed before the projections: 0 · NaN in the backward pass would be NaN.
        kv_tokens = zero_masked(kv_tokens, kv_mask)
        query, key, value = split(q_tokens, "query"), split(kv_tokens, "key"), split(kv_tokens, "value")
        implementation = attention_implementation(query, key)
        if implementation == "heads_first":
            attended = heads_first_attention(query, key, value, kv_mask)
        else:
            mask = jnp.broadcast_to(kv_mask[:, None, None, :], (query.shape[0], 1, query.shape[1], key.shape[1]))
            attended = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
        out = nn.Dense(self.width, dtype=self.dtype, name="out")(attended.reshape(*q_tokens.shape[:2], -1))
        # A fused attention kernel returns no weights, so they are computed separately.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = masked_softmax(scores / math.sqrt(query.shape[-1]), kv_mask[:, None, None, :])  # [B, h, Nq, Nk]
        return zero_masked(out, kv_mask.any(axis=1)), weights


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection (Xiong et al. 2020, arXiv:2002.04745).

    Attributes:
      heads: attention heads; divides `width`.
      width: width of the tokens.
      mlp_ratio: ratio of the MLP's hidden width to `width`.
      dropout: dropout rate of the residual branches.
      published: whether to match published encoders: exact (erf) GELU and a bias on the keys.
    """

    heads: int
    width: int
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    published: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        mask: jax.Array,
        context: jax.Array | None = None,
        context_mask: jax.Array | None = None,
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Updates `tokens [B, N, D]` by attention to `context [B, Nk, D]`, or by self-attention without a context.

        Args:
          tokens: the queries `[B, N, width]`.
          mask: mask of the queries `[B, N]`.
          context: the keys and values `[B, Nk, width]`.
          context_mask: mask of the context `[B, Nk]`; required with a context.
          train: whether dropout is applied.

        Returns:
          The tokens `[B, N, width]` and the attention weights `[B, heads, N, Nk]`; both are zero for masked queries.
        """

        def dropout(x: jax.Array) -> jax.Array:
            return Dropout(self.dropout)(x, train=train)

        tokens = zero_masked(tokens, mask)
        queries = nn.LayerNorm(dtype=self.dtype, name="norm")(tokens)
        if context is None:
            keys, keys_mask = queries, mask
        else:
            keys_mask = cast(jax.Array, context_mask)
            keys = nn.LayerNorm(dtype=self.dtype, name="norm_context")(zero_masked(context, keys_mask))
        attention = Attention(self.heads, self.width, self.dtype, self.published, name="attention")
        attended, weights = attention(queries, keys, keys_mask)
        tokens = tokens + dropout(attended)

        hidden = nn.LayerNorm(dtype=self.dtype, name="norm_mlp")(tokens)
        hidden = nn.Dense(int(self.mlp_ratio * self.width), dtype=self.dtype, name="mlp_in")(hidden)
        hidden = nn.gelu(hidden, approximate=not self.published)
        tokens = tokens + dropout(nn.Dense(self.width, dtype=self.dtype, name="mlp_out")(hidden))
        return zero_masked(tokens, mask), jnp.where(mask[:, None, :, None], weights, 0.0)
