"""Checks the header of a safetensors file before its tensors are read."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

HEADER_BYTES = 100 << 20  # the limit of the format
NAME_CHARACTERS = 300
RANK = 16  # published tensors have at most 5 axes
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1,
}  # fmt: skip


def check_header(path: Path) -> None:
    """Checks that each tensor is of a type that NumPy has, and of the size that its shape gives, within the file.

    Args:
      path: the file.

    Raises:
      OSError: it cannot be read.
      ValueError: the header is not that of safetensors, or a tensor is not as described; the message is short.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_BYTES, status.st_size - 8):
            raise ValueError(f"its header declares {length:,} bytes, the file has {status.st_size:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    for name, tensor in header.items():
        if name != "__metadata__":
            _check_tensor(name, tensor, status.st_size - 8 - length)


def _check_tensor(name: str, tensor: Any, available: int) -> None:
    if len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"a tensor has the name {name[:40]!r}")
    try:
        dtype, shape, (start, end) = (tensor[key] for key in ("dtype", "shape", "data_offsets"))
        sizes = [int(size) for size in (*shape, start, end)]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"tensor {name!r} has no dtype, shape and two offsets") from error
    if dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name!r} is of dtype {dtype}; convert it to F32 or F16")
    if len(shape) > RANK or min(sizes) < 0 or not 0 <= start <= end <= available:
        raise ValueError(f"tensor {name!r} has the shape {str(list(shape))[:80]} at {start} to {end} of {available}")
    if math.prod(sizes[:-2]) * ITEM_BYTES[dtype] != end - start or max(sizes) > available:
        raise ValueError(f"tensor {name!r} of shape {list(shape)} and dtype {dtype} has {end - start:,} bytes")
