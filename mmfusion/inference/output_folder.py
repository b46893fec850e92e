"""Folders of results, written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmfusion.errors import UserError


def check_new(target: Path, label: str) -> None:
    """Checks that a folder can be created.

    Args:
      target: the folder.
      label: what errors call it, such as `--output=FOLDER`.

    Raises:
      UserError: it exists and is not empty, or its parent does not exist.
    """
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise UserError("exists; give a folder that does not, or is empty", path=label)
    if not target.absolute().parent.is_dir():
        raise UserError(f"there is no folder {target.parent}", path=label)


@contextlib.contextmanager
def new_folder(target: Path, label: str) -> Iterator[Path]:
    """Yields a temporary folder beside the target, and moves it there at the end, unless there was an error.

    Raises:
      UserError: see `check_new`, or the folder cannot be written.
    """
    check_new(target, label)
    temporary = target.absolute().with_name(f".{target.absolute().name}.{os.getpid()}")
    try:
        temporary.mkdir()
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()  # it is empty
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", path=label) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
