"""Convolutions in two equivalent forms: XLA's own, and a matrix product of input patches.

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

_use_patches = contextvars.ContextVar("as_patches", default=False)


@contextlib.contextmanager
def as_patches() -> Iterator[None]:
    """Computes every convolution traced in this context as a matrix product of input patches.

    Under `vmap` over the parameters, XLA turns a convolution into a grouped convolution, whose gradient is slow on GPUs
    (jax issue 13800), but a matrix product into a batched matrix product.
    """
    token = _use_patches.set(True)
    try:
        yield
    finally:
        _use_patches.reset(token)


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
    """Returns a convolution with `kernel` (an integer for both sides of a square) and equal `padding` on all sides.

    The default padding is half the kernel size, so that output i is centred on input i · stride for every input size.
    """
    kernel_shape = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding_per_axis = [side // 2 if padding is None else padding for side in kernel_shape]
    return nn.Conv(
        channels, kernel_shape, stride, [(pad, pad) for pad in padding_per_axis],
        feature_group_count=groups, use_bias=bias, dtype=dtype, name=name, conv_general_dilated=convolve,
    )  # fmt: skip


def convolve(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, *, feature_group_count: int, **options: Any
) -> jax.Array:
    """Convolves `x [B, ..., G·I]` with `kernel [..., I, G·O]`: the `conv_general_dilated` of an `nn.Conv`.

    A feature map smaller than the kernel also uses patches: XLA's CPU backend has only naive loops for this case (with
    512 channels, 2×2 takes 40 times as long as 4×4).
    """
    if not _use_patches.get() and all(n >= k for n, k in zip(x.shape[1:-1], kernel.shape[:-2], strict=True)):
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=feature_group_count, **options
        )
    *kernel_shape, channels, out_channels = kernel.shape
    spatial = "DHW"[-len(kernel_shape) :]
    patches = jax.lax.conv_general_dilated_patches(
        x, kernel_shape, strides, padding, dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    )  # [B, ..., G·I·prod(kernel_shape)]
    matrix = jnp.moveaxis(kernel, -2, 0).reshape(channels * math.prod(kernel_shape), out_channels)
    if feature_group_count == 1:
        return patches @ matrix
    patches = patches.reshape(*patches.shape[:-1], feature_group_count, -1)  # [B, ..., G, I·prod(kernel_shape)]
    matrix = matrix.reshape(matrix.shape[0], feature_group_count, -1)  # [I·prod(kernel_shape), G, O]
    return jnp.einsum("...gk,kgo->...go", patches, matrix).reshape(*patches.shape[:-2], out_channels)
