"""Scalars for TensorBoard, written by the thread that logs them: a full disk neither ends nor stops it."""

import os
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import Summary

from mmfusion.files import Appended


class Events:
    """An events file in a directory; `after`: of a run that goes on, the step whose later events no longer hold.

    Raises:
      OSError: as `Appended` does.
    """

    def __init__(self, directory: str | os.PathLike, after: int | None = None):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{uuid.uuid4().hex[:12]}"
        self._file = Appended(Path(directory) / name)
        self._write(Event(file_version="brain.Event:2"))
        if after is not None:
            self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds scalars by tag."""
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))  # a TFRecord
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + sums[0] + data + sums[1])

    def close(self) -> None:
        """Closes the file; what could not be written is lost."""
        self._file.close()
