"""Reads regular files only, up to a size, and checks the files that are to be written."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from etils import epath

from mmfusion.errors import UserError

FILE_BYTES = 1 << 30  # an image, a recording or a video may have so many


def read_file(path: str | os.PathLike, limit: int = FILE_BYTES) -> bytes:
    """Returns the content of a regular file, and never opens a pipe or a device, which may wait or have no end.

    Args:
      path: the file.
      limit: the largest size, in bytes.

    Raises:
      OSError: it cannot be read, is something else, or is larger; `strerror` is the reason.
      ValueError: a NUL character in the path.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > limit:
        raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, more than {limit:,}", str(path))
    with open(path, "rb", buffering=0) as file:
        return file.read(status.st_size) or b""


def read_text(path: str, limit: int) -> str:
    """Returns the UTF-8 text of a regular file, or of one in a bucket; for errors see `read_file`."""
    if "://" in path:
        return epath.Path(path).read_text()
    return read_file(path, limit).decode()


def check_output(path: str | os.PathLike, flag: str, inputs: Iterable[str | os.PathLike] = ()) -> Path:
    """Returns the file that an output path leads to: a regular file, or none yet, in an existing folder.

    Args:
      path: the path; links are followed.
      flag: the flag that gives it, for errors.
      inputs: files that the command reads, which it must not replace.

    Raises:
      UserError: it is a folder, a device or a pipe, leads to one, or is one of the inputs.
    """
    label = f"{flag}={path}"
    try:
        target = Path(os.path.realpath(path))
        mode, is_input, in_folder = stat.S_IFREG, False, target.parent.is_dir()
        with contextlib.suppress(FileNotFoundError):
            mode = os.stat(target).st_mode
            is_input = any(os.path.samefile(target, source) for source in inputs)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        raise UserError(f"cannot be written: {getattr(error, 'strerror', None) or error}", path=label) from error
    if stat.S_ISDIR(mode) or not in_folder:
        raise UserError("must be a file in an existing folder", path=label)
    if not stat.S_ISREG(mode):
        raise UserError("must be a regular file, which this is not", path=label)
    if is_input:
        raise UserError("is the input, which would be lost", path=label)
    return target
