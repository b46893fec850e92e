"""Audio encoders: a CNN on a log-mel spectrogram, which is computed inside jit, and a CNN on the raw waveform.

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
from mmfusion.models.pooling import max_pool


def mel_filters(rate: int, fft: int, mels: int) -> np.ndarray:
    """Returns triangular mel filters `[fft/2 + 1, mels]` of peak 1, from 0 Hz to rate / 2.

    The band edges are evenly spaced on the HTK mel scale, mel(f) = 2595 log10(1 + f / 700).
    """
    max_mel = 2595.0 * math.log10(1.0 + rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(0.0, max_mel, mels + 2) / 2595.0) - 1.0)  # Hz, [mels + 2]
    bins = np.linspace(0.0, rate / 2, fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0.0).astype(np.float32)


def log_mel(
    waveform: jax.Array, rate: int, *, mels: int = 40, frame_ms: float = 25.0, hop_ms: float = 10.0
) -> jax.Array:
    """Returns the log-mel spectrogram `[B, T, mels]`: log(power of a periodic-Hann STFT · HTK filters + 1e-6).

    Frame t starts at sample t · hop, without centring. Zeros are appended to the waveform, so that T = ceil(S / hop).
    The FFT length is the frame length, rounded up to a power of two.

    Args:
      waveform: `[B, S]` float32 in -1 to 1.
      rate: sampling rate, Hz.
      mels: number F of mel bands.
      frame_ms: frame length, milliseconds.
      hop_ms: hop between frame starts, milliseconds.

    Raises:
      UserError: a frame or a hop is shorter than one sample.
    """
    frame, hop = round(rate * frame_ms / 1000), round(rate * hop_ms / 1000)
    if not (frame and hop):
        path, value = ("hop_ms", hop_ms) if frame else ("frame_ms", frame_ms)
        raise UserError(f"shorter than a sample at rate={rate}", path=path, value=value)
    fft = 1 << (frame - 1).bit_length()
    num_frames = math.ceil(waveform.shape[1] / hop)
    padded = jnp.pad(waveform, ((0, 0), (0, frame)))
    starts = np.arange(num_frames) * hop
    window = 0.5 - 0.5 * np.cos(2.0 * np.pi * np.arange(frame) / frame)
    frames = padded[:, starts[:, None] + np.arange(frame)] * window.astype(np.float32)  # [B, T, frame]
    power = jnp.square(jnp.abs(jnp.fft.rfft(frames, n=fft)))  # [B, T, fft/2 + 1]
    return jnp.log(power @ mel_filters(rate, fft, mels) + 1e-6)  # [B, T, F]


def standardize(features: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `features [B, T, F]` with mean 0 and variance 1 over unmasked frames per example; zeros where masked."""
    features = zero_masked(features, mask)
    count = jnp.maximum(mask.sum(axis=1) * features.shape[-1], 1)[:, None, None]
    mean = features.sum(axis=(1, 2), keepdims=True) / count
    centred = zero_masked(features - mean, mask)
    var = jnp.square(centred).sum(axis=(1, 2), keepdims=True) / count
    return centred * jax.lax.rsqrt(var + 1e-5)


class SpecAugment(nn.Module):
    """Masks two time spans and two frequency spans with the mean, in training (Park et al. 2019, arXiv:1904.08779).

    A span covers at most a third of the unmasked frames or of the bands, so that a third of a short recording remains.

    Attributes:
      frames: maximum length of a time span, frames; 0: none.
      bands: maximum height of a frequency span, mel bands; 0: none.
    """

    frames: int
    bands: int

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Returns standardised `features [B, T, F]` with spans set to 0; time spans lie within `mask [B, T]`."""
        keys = row_keys(self, train=train) if self.frames or self.bands else None
        if keys is None:
            return features

        def span_mask(key: jax.Array, max_width: int, size: jax.Array, length: int) -> jax.Array:
            widths = jax.random.randint(key, (2,), 0, jnp.minimum(max_width, size // 3) + 1)
            offset = jax.random.uniform(jax.random.fold_in(key, 1), (2,))
            first = jnp.floor(offset * (jnp.maximum(size - widths, 0) + 1)).astype(jnp.int32)
            position = jnp.arange(length)[:, None]
            return ((position >= first) & (position < first + widths)).any(axis=1)

        def mask_example(key: jax.Array, example: jax.Array, example_mask: jax.Array) -> jax.Array:
            time_mask = span_mask(jax.random.fold_in(key, 0), self.frames, example_mask.sum(), example.shape[0])
            band_mask = span_mask(jax.random.fold_in(key, 1), self.bands, jnp.int32(example.shape[1]), example.shape[1])
            return jnp.where(time_mask[:, None] | band_mask, 0, example)

        return jax.vmap(mask_example)(keys, features, mask)


class LogMelCNN(nn.Module):
    """Strided convolutions over a standardised log-mel spectrogram; each remaining time step is a token.

    Attributes:
      width: width D of the tokens.
      rate: sampling rate, Hz.
      mels: number of mel bands.
      frame_ms: frame length, milliseconds.
      hop_ms: hop between frame starts, milliseconds.
      channels: channels of each 3×3 convolution.
      strides: stride of each convolution, in time and frequency.
      norm: `layer`, `group`, `batch` or `none`.
      dropout: dropout rate of the last feature map.
      mask_frames, mask_bands: maximum frames and bands of the spans masked by `SpecAugment`; 0: none.
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
        """Encodes float32 waveforms `[B, S]` with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and mask `[B, N]`.

        A frame is unmasked if its first sample is. A token is unmasked if the frame at its centre is.

        Raises:
          UserError: `channels` and `strides` differ in length.
        """
        if len(self.channels) != len(self.strides):
            raise UserError(
                f"channels={self.channels} have another length", path="logmel_cnn.strides", value=self.strides
            )
        hop = round(self.rate * self.hop_ms / 1000)
        spectrum = log_mel(
            zero_masked(x, mask), self.rate, mels=self.mels, frame_ms=self.frame_ms, hop_ms=self.hop_ms
        )  # [B, T, F]
        frame_mask = mask[:, ::hop]  # [B, T]
        spectrum = SpecAugment(self.mask_frames, self.mask_bands)(
            standardize(spectrum, frame_mask), frame_mask, train=train
        )
        feature_map = spectrum[..., None].astype(self.dtype)  # [B, T, F, 1]
        for channels, stride in zip(self.channels, self.strides, strict=True):
            feature_map = conv(channels, 3, stride, self.dtype)(feature_map)  # [B, T', F', C]
            frame_mask = frame_mask[:, ::stride]
            feature_map = nn.gelu(Norm(self.norm, self.axis_name, self.dtype)(feature_map, frame_mask, train=train))
            # A convolution must see zeros past the end, as in an unpadded recording.
            feature_map = zero_masked(feature_map, frame_mask)
        feature_map = Dropout(self.dropout)(feature_map, train=train)
        tokens = feature_map.reshape(*feature_map.shape[:2], -1)  # [B, N, F' · C]
        tokens = nn.Dense(self.width, dtype=self.dtype, name="project")(tokens)
        return normalised_tokens(tokens, frame_mask, self.dtype), frame_mask


class WaveformCNN(nn.Module):
    """One-dimensional convolutions over the raw waveform: M5, 0.5 million parameters (Dai et al., arXiv:1610.00087).

    A wide first convolution of stride 4 is followed by narrow ones, with 4× max pooling after each convolution except
    the last. The last positions are the tokens; the paper max-pools by 4 once more and takes the mean.

    Attributes:
      width: width D of the tokens.
      channels: channels of each convolution.
      kernel: kernel size of the first convolution, samples; the others have size 3.
      norm: `layer`, `group`, `batch` (as in the paper) or `none`.
      dropout: dropout rate of the last feature map.
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
        """Encodes float32 waveforms `[B, S]` with `mask [B, S]` (a prefix) as tokens `[B, N, D]` and mask `[B, N]`.

        N is S / 4^depth, rounded up. A position is unmasked if its first sample is.
        """
        x = zero_masked(x, mask)[:, :, None, None].astype(self.dtype)  # [B, S, 1, 1]
        for layer, channels in enumerate(self.channels):
            stride = 4 if layer == 0 else 1
            x = conv(channels, (self.kernel if layer == 0 else 3, 1), stride, self.dtype)(x)
            mask = mask[:, ::stride]
            x = x[:, : mask.shape[1]]  # an even kernel has one more output position
            x = zero_masked(nn.relu(Norm(self.norm, self.axis_name, self.dtype)(x, mask, train=train)), mask)
            if layer < len(self.channels) - 1:
                x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0), (0, 0)))
                x, mask = max_pool(x, (4, 1), (4, 1)), mask[:, ::4]  # masked positions are 0, the minimum after ReLU
        x = Dropout(self.dropout)(x[:, :, 0], train=train)  # [B, N, C]
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(x), mask, self.dtype), mask
