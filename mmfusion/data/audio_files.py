"""Detects truncated audio files by the sizes that their headers declare, as libsndfile reads most of them silently."""

import dataclasses
import re
import zlib
from typing import Literal

# Formats whose truncation is detected: by `complete`, or for FLAC and MP3 as they are read.
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
OPEN = "the header leaves open how many samples follow: convert it to WAV or FLAC"
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3")


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The layout of a file made of chunks, each of which is an id, its size and its content.

    Attributes:
      order: byte order of the sizes.
      first: offset of the first chunk; before it is the size of the file after that field, except in CAF.
      id_bytes: length of an id.
      size_bytes: length of a size.
      align: chunks start at multiples of it.
      size_counts_header: whether a size includes the id and the size themselves.
      samples: start of the id of the chunk that holds the samples.
    """

    order: Literal["little", "big"]
    first: int = 12
    id_bytes: int = 4
    size_bytes: int = 4
    align: int = 2
    size_counts_header: bool = False
    samples: bytes = b"data"


CHUNKS = {
    b"RIFF": Chunks("little"),  # WAV
    b"RIFX": Chunks("big"),  # WAV with big-endian samples
    b"RF64": Chunks("little"),  # EBU Tech 3306
    b"FORM": Chunks("big", samples=b"SSND"),  # AIFF, AIFF-C
    b"riff": Chunks("little", first=40, id_bytes=16, size_bytes=8, align=8, size_counts_header=True),  # Sony Wave64
    b"caff": Chunks("big", first=8, size_bytes=8, align=1),  # Apple Core Audio Format 1.0
}


def complete(data: bytes) -> bytes:
    """Returns an audio file without what follows its samples where libsndfile would read that as samples, too.

    Of WAV, which programs write to pipes, sizes that are left open are accepted.

    Args:
      data: the file's bytes.

    Raises:
      ValueError: the file is shorter than its header says, declares no samples and has some, or leaves their number
        open.
    """
    if not data:
        raise ValueError("empty file")
    if data[:4] in CHUNKS:
        end = _samples_end(data, CHUNKS[data[:4]])
        return data[:end] if data[:4] == b"riff" else data
    if data[:4] in (b".snd", b"dns."):  # AU: offset and size of the samples in bytes 4 to 12
        order: Literal["little", "big"] = "big" if data[:4] == b".snd" else "little"
        offset, size = (int.from_bytes(data[i : i + 4], order) for i in (4, 8))
        start = max(offset, 24)
        if size == 2**32 - 1:
            raise ValueError(OPEN)
        _check_end(data, start + size)
        if size == 0:
            _check_nothing_follows(data, start)
    elif data[:8] == b"NIST_1A\n":
        return data[: _nist_end(data)]
    elif data[:4] == b"OggS":
        _check_ogg(data)
    return data


def _check_end(data: bytes, end: int) -> None:
    if end > len(data):
        raise ValueError(f"truncated: {len(data)} of {end} bytes")


def _check_nothing_follows(data: bytes, end: int) -> None:
    if end < len(data):
        raise ValueError(f"the header declares no samples, but {len(data) - end} bytes follow")


def _samples_end(data: bytes, layout: Chunks) -> int | None:
    """Returns where the samples of a complete file end; None if it has none, or if that is left open."""
    header, unknown = layout.id_bytes + layout.size_bytes, 2 ** (8 * layout.size_bytes) - 1
    file_end = long_size = 0

    def size_at(position: int, size_bytes: int = layout.size_bytes) -> int:
        _check_end(data, position + size_bytes)
        return int.from_bytes(data[position : position + size_bytes], layout.order)

    if data[:4] != b"caff" and (size := size_at(layout.id_bytes)) not in (0, unknown):
        file_end = size if layout.size_counts_header else 8 + size
    if data[:4] == b"RF64" and data[12:16] == b"ds64":  # 64-bit sizes of the file and the samples
        size, long_size = size_at(20, 8), size_at(28, 8)
        file_end = 8 + size if size else 0
    _check_end(data, file_end)
    position = layout.first
    while not data.startswith(layout.samples, position):
        if file_end and position >= file_end:
            return None
        size = max(size_at(position + layout.id_bytes) + (0 if layout.size_counts_header else header), header)
        position += size + -size % layout.align
    size = size_at(position + layout.id_bytes)
    if size == unknown and data[:4] == b"RF64":
        size = long_size
    if size == unknown:
        if data[:4] in (b"RIFF", b"RIFX"):
            return None
        raise ValueError(OPEN)
    if size == 0:
        if data[:4] != b"FORM":  # in AIFF, libsndfile reads what follows, and else nothing
            _check_nothing_follows(data, max(position + header, file_end))
            return None
        size = 8 + _aiff_bytes(data)  # offset and block size before the samples
    end = position + size + (0 if layout.size_counts_header else header)
    _check_end(data, end)
    return end


def _aiff_bytes(data: bytes) -> int:
    """Returns the bytes of the samples of an AIFF file by its chunk COMM: channels, frames, and bits of a sample.

    Raises:
      ValueError: it has none before the samples, or they are compressed.
    """
    found = re.search(rb"COMM\0\0\0\x12(..)(....)(..)", data[: data.index(b"SSND")], re.DOTALL)
    if found is None or data[8:12] != b"AIFF":
        raise ValueError(OPEN)
    channels, frames, bits = (int.from_bytes(field) for field in found.groups())
    return channels * frames * -(-bits // 8)


def _check_ogg(data: bytes) -> None:
    """Raises ValueError unless an Ogg file is a row of pages with their checksums, without a gap, up to a last one.

    libsndfile skips pages that are damaged or missing (RFC 3533: the layout of a page).
    """
    position, following, ended = 0, {}, False
    while position < len(data):
        _check_end(data, position + 27)
        if data[position : position + 4] != b"OggS":
            raise ValueError(f"damaged: no Ogg page at byte {position}")
        segments = position + 27 + data[position + 26]
        end = segments + sum(data[position + 27 : segments])
        _check_end(data, max(end, segments))
        page, serial = data[position:end], data[position + 14 : position + 18]
        number, checksum = (int.from_bytes(page[i : i + 4], "little") for i in (18, 22))
        if checksum != ogg_checksum(page[:22] + bytes(4) + page[26:]):
            raise ValueError(f"damaged: the checksum of the Ogg page at byte {position} does not match")
        if number != following.setdefault(serial, number):
            raise ValueError(f"damaged: Ogg pages before byte {position} are missing")
        following[serial], ended, position = number + 1, bool(page[5] & 4), end
    if not ended:
        raise ValueError("truncated: the last page is missing")


def ogg_checksum(page: bytes) -> int:
    """Returns the CRC-32 of an Ogg page: zlib's with the bits of each byte, and of the result, in reverse order."""
    crc = zlib.crc32(page.translate(REVERSED), 2**32 - 1) ^ 2**32 - 1  # so that it starts from 0, and is not inverted
    return int(f"{crc:032b}"[::-1], 2)


def _nist_end(data: bytes) -> int | None:
    """Returns where the samples of a complete NIST SPHERE file end; None if its text header does not say that."""
    header = int(data[8:16]) if data[8:16].strip().isdigit() else 1024  # the second line is the header's length
    _check_end(data, max(header, 16))
    fields = {name: int(value) for name, value in re.findall(rb"(\w+) -i (\d{1,18})", data[:header])}
    if b"sample_count" not in fields:
        return None
    end = header + fields[b"sample_count"] * fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 1)
    _check_end(data, end)
    return end


# Bit rates in kbit/s by index, of layer III in MPEG 1 and in MPEG 2 and 2.5; sampling rates of MPEG 1 in Hz.
MP3_BIT_RATES = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_DECLARES = re.compile(  # bit 0 of the flags after the name says whether the number of frames follows
    rb"(?:Xing|Info)(?:\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](....))?|VBRI(?:.{10}(....))?", re.DOTALL
)
MP3_RATES = (44_100, 48_000, 32_000)


def mp3_samples(data: bytes) -> int | None:
    """Returns the number of samples per channel in the frames of an MP3 file; None if its first frame declares it.

    libsndfile takes the length of other files from the first frame's bit rate, which is wrong if the bit rate varies.

    Args:
      data: the file's bytes.

    Raises:
      ValueError: a frame is incomplete, or there are bytes between frames, which libsndfile would skip.
    """
    position, samples = 0, 0
    if data[:3] == b"ID3":  # size without its 10-byte header in four bytes of 7 bits
        position = 10 + sum(byte << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    declares = MP3_DECLARES.search(data[position : position + 80])  # the first frame, which then has no samples
    frames = declares and (declares[1] or declares[2])
    left = 1 + int.from_bytes(frames) if frames else len(data)  # what follows so many frames is not read
    while (
        left > 0
        and position < len(data)
        and data[position : position + 3] != b"TAG"
        and data[position : position + 8] != b"APETAGEX"
    ):
        _check_end(data, position + 4)
        _, second, third, _ = data[position : position + 4]
        version, rate = second >> 3 & 3, third >> 2 & 3  # MPEG 1, 2 and 2.5 are versions 3, 2 and 0
        is_frame = (
            data[position] == 0xFF and second & 0xE6 == 0xE2 and version != 1 and rate < 3 and 0 < third >> 4 < 15
        )
        if not is_frame:
            raise ValueError(f"no MP3 frame at byte {position}")
        kbits, hertz = MP3_BIT_RATES[version or 2][third >> 4], MP3_RATES[rate] >> (0, 1, 2)[(3, 2, 0).index(version)]
        position += (144_000 if version == 3 else 72_000) * kbits // hertz + (third >> 1 & 1)
        samples += 1152 if version == 3 else 576
        left -= 1
    _check_end(data, position)
    return None if declares else samples
