"""Damaged audio files are read, or refused in one line; what is lost or has a wrong checksum is never read."""

import io
import time

import numpy as np
import pytest
import soundfile
from hypothesis import strategies as st

from mmfusion.data import audio
from tests.data.damage import CUTS, DAMAGE, FLIPS, damaged, few_and_many, is_short_line

RATE, SAMPLES, SECONDS = 8000, 6000, 30  # seconds that reading one file may take
CONTAINERS = [
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("WAV", "IMA_ADPCM"),
    ("WAVEX", "PCM_16"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AIFF", "FLOAT"), ("AU", "PCM_16"),
    ("AU", "FLOAT"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


def encode(kind, subtype):
    rng, file = np.random.default_rng(0), io.BytesIO()
    waveform = 0.4 * np.sin(0.3 * np.arange(SAMPLES)) + 0.05 * rng.normal(size=SAMPLES)
    soundfile.write(file, waveform, RATE, format=kind, subtype=subtype)
    return file.getvalue()


FILES = {f"{kind} {subtype}": encode(kind, subtype) for kind, subtype in CONTAINERS}
NAMES = st.sampled_from(sorted(FILES))
OGGS = st.sampled_from(["OGG VORBIS", "OGG OPUS"])
FLACS = st.sampled_from(["FLAC PCM_16", "FLAC PCM_24"])


def decode(data):
    return audio.TYPE.decode(data, {**audio.OPTIONS, "rate": RATE, "seconds": 1.0}, None)


ORIGINAL = {name: decode(data)[0] for name, data in FILES.items()}


def read_damaged(name, changes):
    """Returns what is read from a damaged file, None where it is refused, in one line and within the limits."""
    data, started = damaged(FILES[name], changes), time.monotonic()
    try:
        result = decode(data)
    except ValueError as error:
        assert is_short_line(error)
        result = None
    else:
        assert result is not None or not data
    assert time.monotonic() - started < SECONDS
    return result


def check_damaged(name, changes):
    result = read_damaged(name, changes)
    if result is not None:
        waveform, mask = result
        assert waveform.shape == mask.shape == (RATE,) and waveform.dtype == np.float32
        assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 2 * audio.MAX_AMPLITUDE


def check_cut(name, cut):
    result = read_damaged(name, [cut])
    assert result is None or np.array_equal(result[0], ORIGINAL[name])


def check_ogg_flipped(name, flip):
    assert read_damaged(name, [flip]) is None


def check_flac_flipped(name, flip):
    data = damaged(FILES[name], [flip])
    if data[:42] == FILES[name][:42]:  # the first block, with the sampling rate, has no checksum
        result = read_damaged(name, [flip])
        assert result is None or np.array_equal(result[0], ORIGINAL[name])


pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # soundfile prints these
test_audio_decode_reads_or_refuses_damaged_files, many_damaged = few_and_many(check_damaged, NAMES, DAMAGE)
test_audio_decode_refuses_files_that_are_cut, many_cut = few_and_many(check_cut, NAMES, CUTS)
test_audio_decode_refuses_ogg_files_with_a_flipped_bit, many_ogg = few_and_many(check_ogg_flipped, OGGS, FLIPS)
test_audio_decode_refuses_flac_files_with_a_flipped_bit_in_a_frame, many_flac = few_and_many(
    check_flac_flipped, FLACS, FLIPS
)


@pytest.mark.thorough
@pytest.mark.parametrize("check", [many_damaged, many_cut, many_ogg, many_flac])
def test_audio_decode_reads_or_refuses_1000_damaged_files(check):
    check()
