"""Convolutions in equivalent forms: XLA's own, and two matrix products of input patches.

B batch · H W feature map · I O channels in and out · G groups · k kernel size
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# A first layer: XLA's CPU backend copies so few channels one by one. Time of XLA's form divided by that of
# `_convolve_runs`, forward and weight gradient, on one core (jax 0.10.2, AVX-512), for 3×3 kernels and batch 64:
#   input      stride  16 channels out  32    64
#   32×32×3    1       1.10             1.39  1.26
#   32×32×3    2       1.45             1.46
#   64×64×3    1                        1.12
#   64×64×3    2                        1.36  1.23
#   16×16×3    1                        1.52
#   16×16×3    2       1.42
#   224×224×3  2                        1.33        (batch 16)
#   32×32×1    1       1.48             1.13
#   32×32×1    2                        1.07
#   32×32×2    1                        1.31
#   32×32×4    1                        1.27
#   32×32×4    2                        1.05
# It loses with 5×5 (0.73) and 7×7 kernels (0.71). More channels are those of hidden layers, whose input has a gradient.
MAX_RUN_CHANNELS = 4
RUN_KERNEL = (3, 3)

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
        if _runs_win(x, kernel):
            return _convolve_runs(x, kernel, strides, padding)
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


def _runs_win(x: jax.Array, kernel: jax.Array) -> bool:
    is_first_layer = kernel.shape[:2] == RUN_KERNEL and x.shape[-1] == kernel.shape[2] <= MAX_RUN_CHANNELS
    return is_first_layer and x.ndim == 4 and x.dtype == jnp.float32 and jax.default_backend() == "cpu"


def _convolve_runs(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any) -> jax.Array:
    """Convolves `x [B, H, W, I]` with `kernel [k, k, I, O]` as a matrix product of patches.

    A patch has k runs of k·I consecutive values, because the channels of neighbours in a row are consecutive.
    """
    size, _, channels, out_channels = kernel.shape
    # Computed once, instead of in each of the copies.
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), *padding, (0, 0))))
    batch, height, width, _ = x.shape
    rows, columns = (height - size) // strides[0] + 1, (width - size) // strides[1] + 1
    starts = jnp.arange(columns)[:, None] * (strides[1] * channels)
    dimensions = jax.lax.GatherDimensionNumbers(offset_dims=(0, 1, 3), collapsed_slice_dims=(), start_index_map=(2,))
    runs = jax.lax.gather(
        x.reshape(batch, height, width * channels), starts, dimensions,
        slice_sizes=(batch, height, size * channels), mode="promise_in_bounds",
    )  # [B, H, W', k·I]  # fmt: skip
    last = strides[0] * (rows - 1) + 1
    patches = jnp.concatenate([runs[:, i : i + last : strides[0]] for i in range(size)], axis=-1)  # [B, H', W', k·k·I]
    product = patches.reshape(-1, size * size * channels) @ kernel.reshape(-1, out_channels)
    return product.reshape(batch, rows, columns, out_channels)
