"""Audio: decoded on the host to mono float32 at one rate, then padded with a mask.

S samples.
"""

import contextlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile

from mmfusion.data.audio_files import FORMATS, complete, mp3_samples
from mmfusion.data.modality_type import Decoded, ModalityType, Options, is_missing
from mmfusion.data.regular_files import read_file

RATES = (1_000, 384_000)  # Hz, the lowest and highest sampling rate of a file
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's number of frames of a FLAC stream
MAX_CHANNELS = 64  # of samples given as an array
MAX_AMPLITUDE = 1000.0  # 60 dB above full scale; floats beyond it are no waveform, but for example unscaled integers
OPTIONS = {
    "rate": 8000,  # Hz; recordings with another rate are resampled
    "stored_rate": 0,  # Hz, of recordings stored as arrays; 0: the same as `rate`
    "seconds": 1.0,  # longer recordings are truncated, shorter ones padded at the end
}


def decode(
    data: bytes | np.ndarray | Sequence | str | os.PathLike,
    rate: int,
    source_rate: int | None = None,
    max_samples: int = 2**26,
) -> np.ndarray:
    """Returns a recording as a mono waveform `[S]` float32 in about [-1, 1] at `rate`; empty if it has no samples.

    Args:
      data: an encoded file's bytes or path (one of `FORMATS`), or samples `[S]` or `[S, channels]`: floats in [-1, 1],
        or integers as 16-bit PCM (also in a wider type, as TFDS stores them). `[channels, S]` is read, too, as the
        longer axis is time: it must be at least 4 times as long as the other.
      rate: sampling rate of the result, in Hz.
      source_rate: sampling rate of an array, in Hz; None: the same as `rate`. Files store their own.
      max_samples: limit on the number of samples over all channels, checked in the header and before resampling.

    Raises:
      ValueError: the data are corrupt, truncated, too long, not finite or far outside [-1, 1], or it is not clear which
        axis of an array is time; the message is short.
    """
    if isinstance(data, (bytes, str, os.PathLike)):
        waveform, source = _from_file(data, max_samples)
    else:
        waveform, source = _from_array(np.asarray(data), max_samples), source_rate or rate
    if waveform.ndim == 2:
        waveform = waveform.mean(axis=1)  # [S]
    if source != rate and len(waveform):
        from scipy.signal import resample_poly  # imported lazily, as it is slow and most datasets need no resampling

        if len(waveform) * rate > max_samples * source:
            raise ValueError(f"{len(waveform)} samples at {source} Hz, more than the limit of {max_samples} at {rate}")
        common = math.gcd(source, rate)
        waveform = resample_poly(waveform, rate // common, source // common)
    return waveform.astype(np.float32, copy=False)


class _Seekable(io.BytesIO):
    """Bytes in which libsndfile may seek before the start; soundfile prints the traceback of an error there."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        with contextlib.suppress(ValueError):
            return super().seek(offset, whence)
        return -1


def _from_array(data: np.ndarray, max_samples: int) -> np.ndarray:
    if data.ndim not in (1, 2) or data.dtype.kind not in "if" or data.dtype == np.int8:
        given = f"{data.dtype}{list(data.shape)}"
        raise ValueError(f"samples are {given}, not 16-bit integers or floats [S] or [S, channels]")
    if data.size > max_samples:
        raise ValueError(f"{data.size} samples, more than the limit of {max_samples}")
    if not data.size:
        return np.zeros(0, np.float32)
    data = _time_first(data) if data.ndim == 2 else data
    if data.dtype.kind == "f":
        _check_amplitude(data)
        return data.astype(np.float32)
    if data.min() < -(2**15) or data.max() >= 2**15:
        raise ValueError("integer samples are outside 16-bit PCM")
    return data.astype(np.float32) / 2**15


def _time_first(samples: np.ndarray) -> np.ndarray:
    """Returns samples `[S, channels]`, given like this or as `[channels, S]`; raises ValueError if it is not clear."""
    channels, length = sorted(samples.shape)
    if channels > MAX_CHANNELS or (channels > 1 and length < 4 * channels):
        raise ValueError(
            f"samples are {list(samples.shape)}, whose time axis is not clear: give [S], or [S, channels] with at most "
            f"{MAX_CHANNELS} channels and S at least 4 times as many"
        )
    return samples if len(samples) == length else samples.T


def _check_amplitude(samples: np.ndarray) -> None:
    if not np.isfinite(samples).all():
        raise ValueError("samples are not finite")
    peak = np.abs(samples).max(initial=0)
    if peak > MAX_AMPLITUDE:
        raise ValueError(f"samples reach {peak:.3g}; floats must be in about [-1, 1]")


def _from_file(data: bytes | str | os.PathLike, max_samples: int) -> tuple[np.ndarray, int]:
    try:
        data = complete(data if isinstance(data, bytes) else read_file(data))
        with soundfile.SoundFile(_Seekable(data)) as file:
            if file.format not in FORMATS or not file.seekable():
                raise ValueError(f"{file.format} {file.subtype} is not supported: convert it to WAV or FLAC")
            if file.frames == UNKNOWN_FRAMES:
                raise ValueError("a stream whose header declares no length: convert it to WAV")
            if file.frames * file.channels > max_samples:
                raise ValueError(f"{file.frames * file.channels} samples, more than the limit of {max_samples}")
            if not RATES[0] <= file.samplerate <= RATES[1]:
                raise ValueError(f"a sampling rate of {file.samplerate} Hz, outside {RATES[0]} to {RATES[1]}")
            declared = (mp3_samples(data) if file.format == "MP3" else None) or file.frames
            waveform = file.read(dtype="float32")
            if len(waveform) < declared:
                raise ValueError(f"truncated or damaged: only {len(waveform)} of {declared} samples can be read")
            _check_amplitude(waveform)
            return waveform, file.samplerate
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except soundfile.SoundFileError as error:
        raise ValueError(f"not a recording: {getattr(error, 'error_string', error)}") from error


def pad(waveform: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the waveform `[S]` float32, truncated or zero-padded at the end, and its mask `[S]` bool.

    Args:
      waveform: `[any]` float32.
      samples: S.
    """
    kept = waveform[:samples]
    padded = np.zeros(samples, np.float32)  # [S]
    padded[: len(kept)] = kept
    return padded, np.arange(samples) < len(kept)


def _shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    samples = round(options["seconds"] * options["rate"])
    return (samples,), np.float32, samples


def _decode(value: Any, options: Options, _: None) -> Decoded:
    if is_missing(value):
        return None
    if isinstance(value, Mapping):
        raise ValueError(f"must be a recording or samples, got a {type(value).__name__}")
    waveform = decode(value, options["rate"], source_rate=options["stored_rate"] or None)
    waveform, mask = pad(waveform, round(options["seconds"] * options["rate"]))
    return (waveform, mask) if mask.any() else None


def _encoder_kwargs(options: Options, _: None) -> dict[str, Any]:
    return {"rate": options["rate"]}


TYPE = ModalityType(
    OPTIONS, _shape, _decode, encoder_kwargs=_encoder_kwargs, takes=("audio", "bytes", "array[1]", "array[2]")
)
