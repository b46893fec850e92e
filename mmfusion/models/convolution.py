"""Convolutions in two equivalent forms: XLA's own, and patches times a matrix.

B batch · I O channels in and out · G groups
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_patches = contextvars.ContextVar("as_patches", default=False)


@contextlib.contextmanager
def as_patches() -> Iterator[None]:
    """Computes every convolution that is traced in this context as patches times a matrix.

    Under `vmap` over the parameters XLA turns a convolution into a grouped one, whose gradient is slow on GPUs (jax
    issue 13800); a matrix product becomes a batched matrix product.
    """
    token = _patches.set(True)
    try:
        yield
    finally:
        _patches.reset(token)


def conv(
    channels: int,
    kernel: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    dtype: Any,
    *,
    padding: int | None = None,
    groups: int = 1,
    bias: bool = True,
    name: str | None = None,
) -> nn.Conv:
    """Returns a convolution with `kernel` (an integer: both sides of a square) and the same `padding` on every side.

    The default padding is half the kernel, so that output i is centred on input i · stride for every input size.
    """
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    pads = [side // 2 if padding is None else padding for side in sides]
    return nn.Conv(
        channels, sides, stride, [(pad, pad) for pad in pads],
        feature_group_count=groups, use_bias=bias, dtype=dtype, name=name, conv_general_dilated=_convolve,
    )  # fmt: skip


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *, feature_group_count: int, **options: Any
) -> jax.Array:
    """Convolves `x [B, ..., G·I]` with `kernel [..., I, G·O]`, with the arguments of `jax.lax.conv_general_dilated`.

    A map smaller than the kernel is also computed as patches: XLA has only plain loops for it on CPU (512 channels on
    2×2 take 40 times as long as on 4×4).
    """
    if not _patches.get() and all(n >= k for n, k in zip(x.shape[1:-1], kernel.shape[:-2], strict=True)):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=feature_group_count, **options
        )
    *sides, channels, out = kernel.shape
    spatial = "DHW"[-len(sides) :]
    patches = jax.lax.conv_general_dilated_patches(
        x, sides, strides, padding, dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )  # [B, ..., G·I·sides]
    matrix = jnp.moveaxis(kernel, -2, 0).reshape(channels * math.prod(sides), out)
    if feature_group_count == 1:
        return patches @ matrix
    patches = patches.reshape(*patches.shape[:-1], feature_group_count, -1)  # [B, ..., G, I·sides]
    matrix = matrix.reshape(matrix.shape[0], feature_group_count, -1)  # [I·sides, G, O]
    return jnp.einsum("...gk,kgo->...go", patches, matrix).reshape(*patches.shape[:-2], out)
