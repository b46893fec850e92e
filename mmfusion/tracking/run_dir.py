"""Where a run's files are: in a local directory, or in a bucket (`gs://...`).

A bucket has no appending, so the small files of a run there are written to a folder of this machine and sent at each
checkpoint; checkpoints go straight to the bucket.
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


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run's directory.

    Attributes:
      name: as it was given.
      folder: where its small files are read and written.
      checkpoints: where its checkpoints are.
      bucket: the directory that the folder stands for, None where the folder is the directory.
    """

    name: str
    folder: Path
    checkpoints: epath.Path
    bucket: epath.Path | None = None

    def upload(self) -> None:
        """Copies the folder's files to the bucket, on the first of several hosts; raises UserError where that fails."""
        if self.bucket is None or jax.process_index():
            return
        with storage_errors(self.name):
            for path in sorted(self.folder.rglob("*"), key=lambda path: path.name == "result.json"):  # that one last
                if path.is_file():
                    there = self.bucket / path.relative_to(self.folder).as_posix()
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(path.read_bytes())


@contextlib.contextmanager
def open_run_dir(workdir: str | os.PathLike) -> Iterator[RunDir]:
    """Yields a run's directory, with the small files that are in the bucket, where it is in one.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_url(workdir):
        yield RunDir(str(workdir), Path(workdir), epath.Path(workdir) / "checkpoints")
        return
    with tempfile.TemporaryDirectory(prefix="mmfusion-") as folder:
        bucket = epath.Path(str(workdir).rstrip("/"))
        place = RunDir(str(workdir), Path(folder), bucket / "checkpoints", bucket)
        with storage_errors(place.name):
            for path in bucket.iterdir() if bucket.exists() else ():
                if path.is_file():
                    (place.folder / path.name).write_bytes(path.read_bytes())
        yield place


def is_url(workdir: str | os.PathLike) -> bool:
    """Returns whether a directory is one of a bucket."""
    return "://" in str(workdir)
