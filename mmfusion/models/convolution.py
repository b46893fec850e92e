"""Convolutions in two forms that compute the same: XLA's own, and as patches times a matrix.

B batch · H W picture · I O channels in and out
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_patches = contextvars.ContextVar("as_patches", default=False)


@contextlib.contextmanager
def as_patches() -> Iterator[None]:
    """Takes every convolution traced within as patches times a matrix.

    Under `vmap` over the parameters XLA makes a grouped convolution of one, whose gradient is slow on GPUs (jax issue
    13800); a matrix product becomes a batch of products.
    """
    token = _patches.set(True)
    try:
        yield
    finally:
        _patches.reset(token)


def conv(channels: int, kernel: int, stride: int, dtype: Any, *, bias: bool = True, name: str | None = None) -> nn.Conv:
    """Returns a square convolution whose cell i stands on input i · stride, whatever the input's size."""
    padding = [(kernel // 2, kernel // 2)] * 2
    return nn.Conv(
        channels, (kernel, kernel), stride, padding,
        use_bias=bias, dtype=dtype, name=name, conv_general_dilated=_convolve,
    )  # fmt: skip


def _convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
    """Convolves `x [B, H, W, I]` with `kernel [h, w, I, O]`; takes what `jax.lax.conv_general_dilated` takes."""
    if not _patches.get():
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    height, width, channels, out = kernel.shape
    patches = jax.lax.conv_general_dilated_patches(
        x, (height, width), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )  # [B, H', W', I·h·w]
    return patches @ jnp.moveaxis(kernel, 2, 0).reshape(channels * height * width, out)
