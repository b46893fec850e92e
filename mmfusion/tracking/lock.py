"""Lets one command at a time into a directory.

The lock is the kernel's, on an open file: it ends with the process, however that ends, and what the file says is only
read by people. On NFS it holds between machines where the server supports locks; after the loss of a machine the server
frees it, which takes a minute or two.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mmfusion.errors import UserError

NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates and locks a directory; one that is left empty is removed again.

    Raises:
      UserError: another command has locked it; the message says which.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = _lock(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the directory vanished, or may not be written any more
            (folder / NAME).unlink()
        os.close(handle)
        if created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(folder: Path) -> int:
    """Returns the handle of the locked file."""
    while True:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with open(handle, "rb") as file:
                holder = _describe(file.read(1000))
            raise UserError(f"another command runs in this directory: {holder}", path=str(folder)) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            print(f"warning: {folder} has no locks ({error.strerror}): run one command there", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):  # the command before has removed it
            if os.path.samestat(os.fstat(handle), os.stat(folder / NAME)):
                break
        os.close(handle)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its description
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode(), 0)
    return handle


def _describe(content: bytes) -> str:
    try:
        holder = json.loads(content)
        return f"process {int(holder['pid'])} on {holder['host']}, since {holder['since']}"
    except (ValueError, TypeError, KeyError):  # not written yet, or on a full disk
        return "an unknown process"
