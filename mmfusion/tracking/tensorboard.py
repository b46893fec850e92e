"""Scalars for TensorBoard.

Records are framed here, because tensorboardX's writers use a thread that ends on a full disk, after which the run would
block on the thread's queue.
"""

import os
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from mmfusion.files import AppendFile


class EventWriter:
    """Writes an events file in a directory; a full disk neither blocks nor ends the run.

    Args:
      directory: it exists.
      resume_step: the step that a resumed run continues from; TensorBoard hides the later events of older files.

    Raises:
      OSError: as `AppendFile` does.
    """

    def __init__(self, directory: str | os.PathLike, resume_step: int | None = None):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
        self._file = AppendFile(Path(directory) / name)
        self._write(Event(file_version="brain.Event:2"))
        if resume_step is not None:
            self._write(Event(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by tag."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_crc32c(length) + data + _masked_crc32c(data))  # one TFRecord

    def close(self, *, failed: bool = False) -> None:
        """Closes the file; records that still cannot be written are lost."""
        self._file.close()


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CRC32C_TABLE = _crc32c_table()


def _masked_crc32c(data: bytes) -> bytes:
    """Returns the masked CRC-32C (Castagnoli) of the TFRecord format, little-endian."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
