"""Audio encoders: a log-mel spectrogram, computed inside jit, and a CNN over it; and a CNN over the bare samples.

B batch · S samples · T frames · F mel bands · C channels · N = T' tokens · D width
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.errors import UserError
from mmfusion.models.convolution import conv
from mmfusion.models.layers import Dropout, Norm, normalised_tokens, row_keys, zero_masked


def mel_filters(rate: int, fft: int, mels: int) -> np.ndarray:
    """Returns triangular filters `[fft/2 + 1, mels]` of peak 1, from 0 Hz to rate / 2.

    Their corners are evenly spaced on the HTK mel scale, mel(f) = 2595 log10(1 + f / 700).
    """
    top = 2595.0 * math.log10(1.0 + rate / 2 / 700.0)
    corners = 700.0 * (10.0 ** (np.linspace(0.0, top, mels + 2) / 2595.0) - 1.0)  # Hz, [mels + 2]
    bins = np.linspace(0.0, rate / 2, fft // 2 + 1)[:, None]
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(np.minimum(rising, falling), 0.0).astype(np.float32)


def log_mel(
    waveform: jax.Array, rate: int, *, mels: int = 40, frame_ms: float = 25.0, hop_ms: float = 10.0
) -> jax.Array:
    """Returns the log-mel spectrogram `[B, T, mels]`: log(power of a periodic-Hann STFT · HTK filters + 1e-6).

    Frame t starts at sample t · hop, without centring; zeros follow the last sample, so that T = ceil(S / hop).
    The transform is as long as the next power of two from the frame up.

    Args:
      waveform: `[B, S]` float32 in -1 to 1.
      rate: samples a second, Hz.
      mels: mel bands F.
      frame_ms: length of a frame, milliseconds.
      hop_ms: from one frame's start to the next one's, milliseconds.

    Raises:
      UserError: a frame or a hop has no sample.
    """
    frame, hop = round(rate * frame_ms / 1000), round(rate * hop_ms / 1000)
    if not (frame and hop):
        raise UserError(f"{hop_ms} ms from frame to frame of {frame_ms} ms are no sample at rate={rate}")
    fft = 1 << (frame - 1).bit_length()
    count = math.ceil(waveform.shape[1] / hop)
    padded = jnp.pad(waveform, ((0, 0), (0, frame)))
    starts = np.arange(count) * hop
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(frame) / frame)
    frames = padded[:, starts[:, None] + np.arange(frame)] * window.astype(np.float32)  # [B, T, frame]
    power = jnp.square(jnp.abs(jnp.fft.rfft(frames, n=fft)))  # [B, T, fft/2 + 1]
    return jnp.log(power @ mel_filters(rate, fft, mels) + 1e-6)  # [B, T, F]


def standardize(features: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `features [B, T, F]` with each row's real frames at mean 0 and variance 1; zeros where masked."""
    features = zero_masked(features, mask)
    count = jnp.maximum(mask.sum(axis=1) * features.shape[-1], 1)[:, None, None]
    mean = features.sum(axis=(1, 2), keepdims=True) / count
    centred = zero_masked(features - mean, mask)
    var = jnp.square(centred).sum(axis=(1, 2), keepdims=True) / count
    return centred * jax.lax.rsqrt(var + 1e-5)


class SpecAugment(nn.Module):
    """Sets two spans of time and two of frequency to the mean, in training only (Park et al. 2019, arXiv:1904.08779).

    A span takes at most a third of what there is, so that a short recording keeps a third of itself.

    Attributes:
      frames: the most frames of a span of time; 0: none.
      bands: the most mel bands of a span of frequency; 0: none.
    """

    frames: int
    bands: int

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Returns `features [B, T, F]`, standardised, with spans of 0; they lie among the real frames `mask [B, T]`."""
        keys = row_keys(self, train=train) if self.frames or self.bands else None
        if keys is None:
            return features

        def spans(key: jax.Array, most: int, size: jax.Array, places: int) -> jax.Array:
            widths = jax.random.randint(key, (2,), 0, jnp.minimum(most, size // 3) + 1)
            share = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
            first = jnp.floor(share * (jnp.maximum(size - widths, 0) + 1)).astype(jnp.int32)
            place = jnp.arange(places)[:, None]
            return ((place >= first) & (place < first + widths)).any(axis=1)

        def one(key: jax.Array, row: jax.Array, real: jax.Array) -> jax.Array:
            times = spans(jax.random.fold_in(key, 0), self.frames, real.sum(), row.shape[0])
            bands = spans(jax.random.fold_in(key, 1), self.bands, jnp.int32(row.shape[1]), row.shape[1])
            return jnp.where(times[:, None] | bands, 0, row)

        return jax.vmap(one)(keys, features, mask)


class LogMelCNN(nn.Module):
    """Strided convolutions over a standardised log-mel spectrogram; each time step left is a token.

    Attributes:
      width: token width D.
      rate: samples a second, Hz.
      mels: mel bands.
      frame_ms: length of a frame, milliseconds.
      hop_ms: from one frame's start to the next one's, milliseconds.
      channels: channels of each 3×3 convolution.
      strides: stride of each, in time and frequency.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: rate on the last feature map.
      mask_frames, mask_bands: the most frames and bands of each span that `SpecAugment` masks; 0: none.
    """

    width: int
    rate: int
    mels: int = 40
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    channels: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 2, 2)
    norm: str = "layer"
    dropout: float = 0.0
    mask_frames: int = 0
    mask_bands: int = 0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "audio"
    layer_order: ClassVar = (r"(Conv|Norm)_\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms `[B, S]` float32 with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and `[B, N]`.

        A frame is real if its first sample is, and a token if its middle frame is.

        Raises:
          UserError: `channels` and `strides` differ in length.
        """
        if len(self.channels) != len(self.strides):
            raise UserError(f"logmel_cnn: channels={self.channels} and strides={self.strides} differ in length")
        hop = round(self.rate * self.hop_ms / 1000)
        spectrum = log_mel(
            zero_masked(x, mask), self.rate, mels=self.mels, frame_ms=self.frame_ms, hop_ms=self.hop_ms
        )  # [B, T, F]
        frames = mask[:, ::hop]  # [B, T]
        spectrum = SpecAugment(self.mask_frames, self.mask_bands)(standardize(spectrum, frames), frames, train=train)
        cells = spectrum[..., None].astype(self.dtype)  # [B, T, F, 1]
        for channels, stride in zip(self.channels, self.strides, strict=True):
            cells = conv(channels, 3, stride, self.dtype)(cells)  # [B, T', F', C]
            frames = frames[:, ::stride]
            cells = nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(cells, frames, train=train))
            # A convolution must see zeros past the end, as a clip without padding would.
            cells = zero_masked(cells, frames)
        cells = Dropout(self.dropout)(cells, train=train)
        tokens = cells.reshape(*cells.shape[:2], -1)  # [B, N, F' · C]
        tokens = nn.Dense(self.width, dtype=self.dtype, name="project")(tokens)
        return normalised_tokens(tokens, frames, self.dtype), frames


class WaveformCNN(nn.Module):
    """One-dimensional convolutions over the bare samples: M5, half a million weights (Dai et al., arXiv:1610.00087).

    A wide first convolution of stride 4, then narrow ones; the maximum of four places after each but the last, whose
    places are the tokens (the paper takes one more maximum of four, then the mean).

    Attributes:
      width: token width D.
      channels: channels of each convolution.
      kernel: samples that the first convolution reads; the others read 3 places.
      norm: `layer`, `group`, `batch` (as in the paper) or `none`.
      dropout: rate on the last feature map.
    """

    width: int
    channels: tuple[int, ...] = (128, 128, 256, 512)
    kernel: int = 80
    norm: str = "batch"
    dropout: float = 0.0
    dtype: Any = jnp.float32
    axis_name: str | None = None

    reads: ClassVar[str] = "audio"
    layer_order: ClassVar = (r"(Conv|Norm)_\d+", "project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes waveforms `[B, S]` float32 with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and `[B, N]`.

        N is S over 4^depth, rounded up; a place is real if the first sample under it is.
        """
        x = zero_masked(x, mask)[:, :, None, None].astype(self.dtype)  # [B, S, 1, 1]
        for layer, channels in enumerate(self.channels):
            stride = 4 if layer == 0 else 1
            x = conv(channels, (self.kernel if layer == 0 else 3, 1), stride, self.dtype)(x)
            mask = mask[:, ::stride]
            x = x[:, : mask.shape[1]]  # an even kernel makes one place more
            x = zero_masked(nn.relu(Norm(self.norm, self.axis_name, self.dtype)(x, mask, train=train)), mask)
            if layer < len(self.channels) - 1:
                x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0), (0, 0)))
                x, mask = nn.max_pool(x, (4, 1), (4, 1)), mask[:, ::4]  # what is masked is 0, and nothing is below
        x = Dropout(self.dropout)(x[:, :, 0], train=train)  # [B, N, C]
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(x), mask, self.dtype), mask
