"""The directory of a training run: whose it is, and what is uploaded as the run ends."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.data import trust
from mmfusion.errors import UserError
from mmfusion.files import DISK_FULL
from mmfusion.tracking import run_dir
from mmfusion.training import seal, warm_start


@contextlib.contextmanager
def run_directory(workdir: str | Path, config: ConfigDict) -> Iterator[run_dir.RunDir]:
    """Yields the directory of a run, and uploads what is left in it at the end, whatever that is.

    Raises:
      UserError: the directory belongs to another run, another command is in it, or it cannot be written.
    """
    with run_dir.open_run_dir(workdir) as directory, contextlib.ExitStack() as stack:
        check_owner(directory, config)
        try:
            stack.enter_context(directory.locked())
            yield directory
        except OSError as error:
            path = Path(error.filename or "").absolute()
            own = path.is_relative_to(directory.folder.absolute())  # it vanished, or may not be written
            if error.errno not in DISK_FULL and not own:
                raise
            raise UserError(
                f"cannot write: {error.strerror}; what was saved is untouched, and the same command continues the run",
                path=error.filename or directory.name,
            ) from error
        except BaseException:
            try:
                directory.upload()
            except UserError as error:  # the first error is the one to report
                print(f"warning: {error}", file=sys.stderr)
            raise
        directory.upload()


def check_owner(directory: run_dir.RunDir, config: ConfigDict) -> None:
    """Raises UserError unless the directory is new, or its config differs in where things are and failures only."""
    workdir = directory.folder
    if workdir.exists() and not workdir.is_dir():
        raise UserError("is a file; give a directory", path="--workdir", value=str(workdir))
    parent = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        message = f"cannot be made: {parent} is no folder that you may write to"
        raise UserError(message, path="--workdir", value=str(workdir))
    trust.remember(configs.to_json(config))
    if not (workdir / seal.FILE).exists():
        warm_start.check_sources(configs.read(config).model.encoders)
    seal.check_owner(directory, config)
