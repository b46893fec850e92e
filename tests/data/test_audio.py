import io
import itertools
import struct

import numpy as np
import pytest
import soundfile

from mmfusion.data import audio

RATE = 8000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)  # one second of A4


def encode(waveform, kind="WAV", rate=RATE, **options):
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_audio_decode_is_exact_for_lossless_files(kind, tmp_path):
    (tmp_path / "tone").write_bytes(encode(TONE, kind))
    for data in (encode(TONE, kind), tmp_path / "tone", str(tmp_path / "tone")):
        waveform = audio.decode(data, RATE)
        assert waveform.dtype == np.float32
        np.testing.assert_allclose(waveform, TONE, atol=1 / 2**15)


def test_audio_decode_of_ogg_is_close():
    waveform = audio.decode(encode(TONE, "OGG"), RATE)
    assert len(waveform) == RATE
    assert np.corrcoef(waveform, TONE)[0, 1] > 0.99


def test_audio_decode_averages_channels():
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    np.testing.assert_allclose(audio.decode(encode(stereo), RATE), TONE / 2, atol=1 / 2**15)
    np.testing.assert_allclose(audio.decode(stereo, RATE), TONE / 2, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.int16, np.int64])
def test_audio_decode_treats_integers_as_16_bit_pcm(kind):
    samples = np.array([-(2**15), 0, 2**14, 2**15 - 1]).astype(kind)
    np.testing.assert_array_equal(audio.decode(samples, RATE), np.float32([-1, 0, 0.5, (2**15 - 1) / 2**15]))


@pytest.mark.parametrize("source", [4000, 11025, 16000, 44100])
def test_audio_resampling_keeps_frequency_and_duration(source):
    tone = np.sin(2 * np.pi * 440 * np.arange(source) / source).astype(np.float32)
    waveform = audio.decode(encode(tone, rate=source, subtype="FLOAT"), RATE)
    assert abs(len(waveform) - RATE) <= 1
    expected = np.sin(2 * np.pi * 440 * np.arange(len(waveform)) / RATE)
    np.testing.assert_allclose(waveform[400:-400], expected[400:-400], atol=0.02)
    np.testing.assert_array_equal(audio.decode(tone, RATE, source_rate=source), waveform)


def test_audio_downsampling_does_not_alias():
    high = np.sin(2 * np.pi * 3500 * np.arange(16000) / 16000).astype(np.float32)
    assert np.abs(audio.decode(high, 4000, source_rate=16000)[200:-200]).max() < 0.02


def test_audio_decode_of_zero_samples_is_empty():
    for data in (encode(TONE[:0]), TONE[:0], np.zeros(0, np.int16)):
        waveform = audio.decode(data, 16000, *([RATE] if isinstance(data, np.ndarray) else []))
        assert (waveform.shape, waveform.dtype) == ((0,), np.float32)


def wav_with_rate(rate):
    data = bytearray(encode(TONE))
    data[24:28] = struct.pack("<I", rate)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an audio file", "not a recording"),
        (encode(TONE)[:-7], "truncated"),
        (encode(TONE, "FLAC")[:-7], "not a recording"),
        (encode(TONE, "OGG")[:-7], "truncated"),
        ("/no/such/file.wav", "No such file"),
        (wav_with_rate(2**30), "a sampling rate of"),
        (np.array([0.0, np.nan]), "finite"),
        (encode(np.array([0.0, np.inf]), subtype="FLOAT"), "finite"),
        (np.array([2**15]), "16-bit"),
        (np.zeros((2, 2, 2), np.float32), "float32"),
        (np.zeros(4, bool), "bool"),
    ],
    ids=itertools.count(),  # encoded bytes contain a timestamp, so they cannot be ids
)
def test_audio_decode_rejects_bad_data_with_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        audio.decode(data, RATE)
    assert len(str(error.value)) <= 200


def test_audio_decode_detects_ogg_truncation_between_pages():
    data = encode(np.random.default_rng(0).normal(size=40_000) * 0.1, "OGG")
    assert data.count(b"OggS") > 3
    with pytest.raises(ValueError, match="truncated"):
        audio.decode(data[: data.rfind(b"OggS")], RATE)


def test_audio_decode_rejects_long_recordings_by_header(monkeypatch):
    data = encode(TONE)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    for recording in (data, TONE):
        with pytest.raises(ValueError, match="limit of 7999"):
            audio.decode(recording, RATE, max_samples=7999)


def test_audio_decode_limits_samples_after_resampling():
    recording = encode(TONE, rate=1000)
    assert len(audio.decode(recording, 2000)) == 2 * len(TONE)
    with pytest.raises(ValueError, match=f"{len(TONE)} samples at 1000 Hz, more than the limit of 9000 at 2000"):
        audio.decode(recording, 2000, max_samples=9000)


def test_audio_pad_pads_and_truncates_with_a_mask():
    waveform, mask = audio.pad(np.float32([1, 2, 3]), 5)
    np.testing.assert_array_equal(waveform, [1, 2, 3, 0, 0])
    np.testing.assert_array_equal(mask, [1, 1, 1, 0, 0])
    waveform, mask = audio.pad(np.float32([1, 2, 3]), 2)
    np.testing.assert_array_equal(waveform, [1, 2])
    assert mask.all()
    assert waveform.dtype == np.float32
    assert not audio.pad(np.zeros(0, np.float32), 2)[1].any()
