import io
import itertools
import struct

import numpy as np
import pytest
import soundfile

from mmfusion.data import audio
from mmfusion.data.audio_files import mp3_samples, ogg_checksum

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


def test_audio_decode_takes_the_longer_axis_of_an_array_as_time():
    stereo = np.stack([TONE, np.zeros_like(TONE)], axis=1)
    for samples in (stereo, stereo.T, np.int16(2**15 * stereo.T), np.repeat(stereo, 32, axis=1).T):
        np.testing.assert_allclose(audio.decode(samples, RATE), TONE / 2, atol=1 / 2**15)
    for samples in (TONE[:3, None], TONE[None, :3], TONE[None, :1]):  # one channel, however short
        np.testing.assert_array_equal(audio.decode(samples, RATE), samples.ravel())


@pytest.mark.parametrize("shape", [(8, 8), (2, 7), (7, 2), (65, 8000), (8000, 65)])
def test_audio_decode_rejects_arrays_whose_time_axis_is_not_clear(shape):
    with pytest.raises(ValueError, match=rf"\[{shape[0]}, {shape[1]}\], .* give \[S\], or \[S, channels\]") as error:
        audio.decode(np.zeros(shape, np.float32), RATE)
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize("shape", [(0,), (0, 2), (2, 0)])
def test_audio_decode_of_an_array_without_samples_is_absent(shape):
    assert audio.decode(np.zeros(shape, np.float32), RATE).shape == (0,)
    assert audio.TYPE.decode(np.zeros(shape, np.float32), audio.OPTIONS, None) is None


def test_audio_decode_reads_lists_as_arrays():
    np.testing.assert_array_equal(audio.decode([0.5, -0.5], RATE), [0.5, -0.5])
    for data in (["a", "b"], [[1, 2], [3]]):
        with pytest.raises(ValueError, match=r"samples are <U1|inhomogeneous"):
            audio.decode(data, RATE)


LOUD = np.stack([TONE, -TONE], axis=1) * 2e30  # the mean of the channels is 0


@pytest.mark.parametrize(
    "data", [TONE * 2e30, LOUD, encode(LOUD, subtype="FLOAT"), encode(LOUD, "CAF", subtype="DOUBLE")]
)
def test_audio_decode_rejects_floats_that_are_no_waveform(data):
    with pytest.raises(ValueError, match=r"samples reach 1e\+30; floats must be in about \[-1, 1\]"):
        audio.decode(data, RATE)


def test_audio_decode_rejects_floats_beyond_float32_and_unscaled_integers():
    with pytest.raises(ValueError, match=r"samples reach 1e\+300;"):
        audio.decode(np.array([0, 1e300]), RATE)
    with pytest.raises(ValueError, match=r"samples reach 2\.5e\+04;"):
        audio.decode(np.float32([0, 25_000]), RATE)


@pytest.mark.parametrize("gain", [3, 1999])
def test_audio_decode_keeps_floats_above_full_scale(gain):
    for data in (TONE * gain, encode(TONE * gain, subtype="FLOAT")):
        np.testing.assert_array_equal(audio.decode(data, RATE), TONE * np.float32(gain))


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
        (np.zeros(4, np.int8), "int8"),  # 8-bit samples are not 16-bit PCM
        (np.zeros(4, np.uint16), "uint16"),
    ],
    ids=itertools.count(),  # encoded bytes contain a timestamp, so they cannot be ids
)
def test_audio_decode_rejects_bad_data_with_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        audio.decode(data, RATE)
    assert len(str(error.value)) <= 200


CONTAINERS = [
    ("WAV", "PCM_16", "LITTLE"), ("WAV", "PCM_24", "BIG"), ("WAV", "IMA_ADPCM", "FILE"), ("WAVEX", "FLOAT", "FILE"),
    ("RF64", "PCM_16", "FILE"), ("RF64", "DOUBLE", "FILE"), ("W64", "PCM_U8", "FILE"), ("W64", "MS_ADPCM", "FILE"),
    ("AIFF", "PCM_16", "FILE"), ("AIFF", "PCM_24", "LITTLE"), ("AIFF", "IMA_ADPCM", "FILE"),  # LITTLE: AIFF-C
    ("AU", "PCM_16", "BIG"), ("AU", "ULAW", "LITTLE"), ("CAF", "PCM_16", "FILE"), ("CAF", "ALAC_16", "FILE"),
    ("NIST", "PCM_16", "FILE"), ("FLAC", "PCM_16", "FILE"), ("OGG", "VORBIS", "FILE"), ("OGG", "OPUS", "FILE"),
    ("MP3", "MPEG_LAYER_III", "FILE"),
]  # fmt: skip
LOSSLESS = ("PCM_16", "PCM_24", "FLOAT", "DOUBLE", "ALAC_16")


@pytest.mark.parametrize(("kind", "subtype", "endian"), CONTAINERS)
def test_audio_decode_reads_complete_files_and_rejects_them_cut_anywhere(kind, subtype, endian):
    tone = TONE[:2000]
    data = encode(tone, kind, subtype=subtype, endian=endian)
    waveform = audio.decode(data, RATE)
    assert 2000 <= len(waveform) < 2200  # codecs with blocks pad the last one
    assert np.corrcoef(waveform[:2000], tone)[0, 1] > 0.99
    if subtype in LOSSLESS:
        np.testing.assert_allclose(waveform, tone, atol=1 / 2**15)
    size = len(data)
    for cut in {*range(1, min(size, 130)), *range(130, size, size // 23), size // 2, size - 2, size - 1}:
        with pytest.raises(ValueError, match=r"truncated|not a recording"):
            audio.decode(data[:cut], RATE)


def patched(data, position, content):
    return data[:position] + content + data[position + len(content) :]


WAV, AIFF, RF64, AU = (encode(TONE, kind) for kind in ("WAV", "AIFF", "RF64", "AU"))
UNKNOWN = b"\xff" * 4
STREAMS = [  # files as written to a pipe, where the sizes are not known yet
    patched(patched(WAV, 4, UNKNOWN), 40, UNKNOWN),
    patched(patched(WAV, 4, bytes(4)), 40, UNKNOWN),
    patched(patched(AIFF, 4, bytes(4)), AIFF.index(b"SSND") + 4, bytes(4)),
    patched(AIFF, 4, UNKNOWN),
]


@pytest.mark.parametrize("data", STREAMS, ids=itertools.count())
def test_audio_decode_reads_streams_that_declare_no_size(data):
    np.testing.assert_allclose(audio.decode(data, RATE), TONE, atol=1 / 2**15)


@pytest.mark.parametrize(
    "data",
    [
        patched(patched(WAV, 4, bytes(4)), 40, bytes(4)),
        patched(patched(WAV, 4, struct.pack("<I", 36)), 40, bytes(4)),
        patched(RF64, 20, bytes(16)),
        patched(AU, 8, bytes(4)),
    ],
    ids=itertools.count(),
)
def test_audio_decode_rejects_samples_after_a_header_that_declares_none(data):
    with pytest.raises(ValueError, match=r"declares no samples, but \d+ bytes follow"):
        audio.decode(data, RATE)


def test_audio_decode_compares_the_size_of_the_samples_where_that_of_the_file_is_unknown():
    for data in (patched(WAV, 4, bytes(4)), patched(RF64, 20, bytes(8))):
        np.testing.assert_allclose(audio.decode(data, RATE), TONE, atol=1 / 2**15)
        with pytest.raises(ValueError, match=f"truncated: {len(data) - 2} of {len(data)} bytes"):
            audio.decode(data[:-2], RATE)


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "CAF", "AU", "NIST"])
def test_audio_decode_does_not_read_what_follows_the_samples(kind):
    data = encode(TONE[:801], kind, subtype="PCM_24")  # an odd number of bytes, so that most formats add one
    for extra in (b"", b"\1" * 3, b"\1" * 11):
        np.testing.assert_allclose(audio.decode(data + extra, RATE), TONE[:801], atol=1 / 2**15)


def test_audio_decode_skips_chunks_around_the_samples():
    note = b"LIST" + struct.pack("<I", 5) + b"12345\0"
    data = WAV[:36] + note + WAV[36:] + note
    for size in (0, len(data) - 8):
        np.testing.assert_allclose(audio.decode(patched(data, 4, struct.pack("<I", size)), RATE), TONE, atol=1 / 2**15)
    w64 = encode(TONE, "W64")
    levels = b"levl" + bytes.fromhex("f3acd3118cd100c04f8edb8a") + struct.pack("<Q", 40) + b"\7" * 16
    w64 = patched(w64 + levels, 16, struct.pack("<Q", len(w64 + levels)))
    np.testing.assert_allclose(audio.decode(w64, RATE), TONE, atol=1 / 2**15)


def test_audio_decode_detects_flac_truncation_between_frames():
    data = encode(np.random.default_rng(0).normal(size=40_000) * 0.1, "FLAC")
    frames = [i for i in range(len(data)) if data.startswith(b"\xff\xf8", i)]
    assert len(frames) > 5
    for frame in frames:
        with pytest.raises(ValueError, match=r"truncated|not a recording"):
            audio.decode(data[:frame], RATE)


def test_audio_decode_rejects_flac_without_its_length():
    data = encode(TONE, "FLAC")
    assert data[4] & 127 == 0  # STREAMINFO, whose number of samples is 36 bits from the middle of byte 21
    with pytest.raises(ValueError, match="declares no length"):
        audio.decode(patched(data, 21, bytes([data[21] & 0xF0, 0, 0, 0, 0])), RATE)


def mp3(mode):
    """Returns an MP3 file of noise, the length of its first frame, which declares its number of frames, and samples."""
    noise = (np.random.default_rng(0).normal(size=(3 * RATE)) * 0.1 * np.repeat([1, 0.01, 1], RATE)).astype(np.float32)
    data = encode(noise, "MP3", bitrate_mode=mode, compression_level=0.5)
    return data, data.index(data[:2], 4), len(noise)


def test_audio_decode_reads_mp3_without_a_declared_length_if_its_bit_rate_is_constant():
    data, first, samples = mp3("CONSTANT")
    assert mp3_samples(data) is None and len(audio.decode(data, RATE)) == samples
    bare = data[first:]
    count = mp3_samples(bare)
    assert samples <= count < samples + 4 * 576  # the encoder's delay and padding are part of the frames
    for extra in (b"", b"TAG" + bytes(125), b"APETAGEX" + bytes(24)):
        assert len(audio.decode(bare + extra, RATE)) == count
    assert len(audio.decode(b"ID3\3\0\0\0\0\1\0" + bytes(128) + bare, RATE)) == count
    for cut in (len(bare) - 1, len(bare) // 2 + 7):  # between frames, it cannot be detected
        with pytest.raises(ValueError, match="truncated"):
            audio.decode(bare[:cut], RATE)
    with pytest.raises(ValueError, match=f"no MP3 frame at byte {len(bare)}"):
        audio.decode(bare + b"\1" * 8, RATE)


def test_audio_decode_rejects_mp3_without_a_declared_length_if_its_bit_rate_varies():
    data, first, samples = mp3("VARIABLE")
    assert len(audio.decode(data, RATE)) == samples
    with pytest.raises(ValueError, match=f"only .* of {mp3_samples(data[first:])} samples"):
        audio.decode(data[first:], RATE)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("MAT5", "PCM_16"),
        ("VOC", "PCM_16"),
        ("SVX", "PCM_16"),
        ("PAF", "PCM_16"),
        ("IRCAM", "PCM_16"),
        ("WAV", "GSM610"),
    ],
)
def test_audio_decode_rejects_formats_whose_truncation_it_cannot_detect(kind, subtype):
    with pytest.raises(ValueError, match=f"^{kind} {subtype} is not supported: convert it to WAV or FLAC"):
        audio.decode(encode(TONE, kind, subtype=subtype), RATE)


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


def test_audio_decode_detects_missing_and_damaged_ogg_pages():
    data = encode(np.random.default_rng(0).normal(size=40_000) * 0.1, "OGG")
    pages = [i for i in range(len(data)) if data.startswith(b"OggS", i)]
    assert ogg_checksum(b"123456789") == 0x89A1897F  # CRC-32 as of Ogg, from the catalogue of CRC algorithms
    for first, last in itertools.pairwise(pages[2:]):
        with pytest.raises(ValueError, match=f"damaged: Ogg pages before byte {first} are missing"):
            audio.decode(data[:first] + data[last:], RATE)
        with pytest.raises(ValueError, match=f"the checksum of the Ogg page at byte {first} does not match"):
            audio.decode(patched(data, first + 100, bytes([data[first + 100] ^ 1])), RATE)
        with pytest.raises(ValueError, match=f"no Ogg page at byte {first}"):
            audio.decode(data[:first] + bytes(40) + data[first:], RATE)


def test_audio_decode_rejects_bytes_between_mp3_frames():
    data, first, samples = mp3("CONSTANT")
    for position in (first, first + 300, len(data) // 2):
        with pytest.raises(ValueError, match=r"no MP3 frame at byte|truncated|not a recording"):
            audio.decode(data[:position] + b"\1" * 64 + data[position:], RATE)
    assert len(audio.decode(data + b"\1" * 64, RATE)) == samples  # behind the declared number of frames


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_audio_decode_prints_nothing_where_libsndfile_seeks_before_the_start():
    with pytest.raises(ValueError, match="not a recording"):
        audio.decode(AIFF.replace(b"SSND", b"SfND"), RATE)
