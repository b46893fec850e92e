"""The directory of a run: local, or in a bucket (`gs://...`).

Objects in a bucket cannot be appended to. The small files of a run there are written to a local folder and uploaded at
each checkpoint; checkpoints are written to the bucket directly.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from mmfusion.errors import storage_errors
from mmfusion.files import RemoteFolder
from mmfusion.tracking.lock import locked


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run's directory.

    Attributes:
      name: the path or URL as given.
      folder: local folder where small files are read and written.
      checkpoints: folder of the checkpoints.
      bucket: the directory in the bucket; None where `folder` is the directory itself.
    """

    name: str
    folder: Path
    checkpoints: epath.Path
    bucket: epath.Path | None = None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which no other command is let in; only on the primary host, and not in a bucket.

        Raises:
          UserError: another command is in it.
        """
        return contextlib.nullcontext() if self.bucket or jax.process_index() else locked(self.folder)

    def upload(self) -> None:
        """Copies the folder's files to the bucket, on the primary host, `result.json` last.

        Raises:
          UserError: the bucket cannot be written.
        """
        if self.bucket is None or jax.process_index():
            return
        with storage_errors(self.name):
            RemoteFolder(str(self.bucket), self.folder).upload(self.folder.rglob("*"))


@contextlib.contextmanager
def open_run_dir(workdir: str | os.PathLike) -> Iterator[RunDir]:
    """Yields a run's directory; where it is in a bucket, with a temporary local copy of its small files.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_url(workdir):
        yield RunDir(str(workdir), Path(workdir), epath.Path(workdir) / "checkpoints")
        return
    with tempfile.TemporaryDirectory(prefix="mmfusion-") as folder:
        bucket = epath.Path(str(workdir).rstrip("/"))
        local = Path(folder) / bucket.name  # some sinks name the run like its directory
        local.mkdir()
        directory = RunDir(str(workdir), local, bucket / "checkpoints", bucket)
        with storage_errors(directory.name):
            remote = RemoteFolder(str(bucket), directory.folder)
            remote.download(remote.names(recursive=False))
        yield directory


def is_url(workdir: str | os.PathLike) -> bool:
    """Returns whether a directory is in a bucket."""
    return "://" in str(workdir)
