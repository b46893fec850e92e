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
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.errors import UserError, reaching


@dataclasses.dataclass(frozen=True)
class Place:
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

    def send(self) -> None:
        """Copies the folder's files to the bucket, on the first of several hosts; raises UserError where that fails."""
        if self.bucket is None or jax.process_index():
            return
        with reaching(self.name):
            for path in sorted(self.folder.rglob("*"), key=lambda path: path.name == "result.json"):  # that one last
                if path.is_file():
                    there = self.bucket / path.relative_to(self.folder).as_posix()
                    there.parent.mkdir(parents=True, exist_ok=True)
                    there.write_bytes(path.read_bytes())


@contextlib.contextmanager
def opened(workdir: str | os.PathLike) -> Iterator[Place]:
    """Yields a run's directory, with the small files that are in the bucket, where it is in one.

    Raises:
      UserError: the bucket cannot be read.
    """
    if not is_url(workdir):
        yield Place(str(workdir), Path(workdir), epath.Path(workdir) / "checkpoints")
        return
    with tempfile.TemporaryDirectory(prefix="mmfusion-") as folder:
        bucket = epath.Path(str(workdir).rstrip("/"))
        place = Place(str(workdir), Path(folder), bucket / "checkpoints", bucket)
        with reaching(place.name):
            for path in bucket.iterdir() if bucket.exists() else ():
                if path.is_file():
                    (place.folder / path.name).write_bytes(path.read_bytes())
        yield place


def check_owner(place: Place, config: ConfigDict) -> None:
    """Raises UserError unless a run may be here: a directory belongs to the config that began it.

    Only where things are may change, and what is done about failures.
    """
    workdir = place.folder
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a directory")
    parent = next(folder for folder in (workdir.absolute(), *workdir.absolute().parents) if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"--workdir={workdir} cannot be made: {parent} is no folder that you may write to")
    path = workdir / "config.json"
    if not path.exists():
        return
    before = configs.to_json(configs.from_json(configs.read_json(path)))
    saved, mine = (configs.flat(values) for values in (before, configs.to_json(config)))
    for key in sorted({*saved, *mine} - {*configs.PLACES, *configs.PATIENCE}):
        if saved.get(key) != mine.get(key):
            raise UserError(
                f"{place.name} belongs to another run: its config.{key} is {saved.get(key)!r}, here it is "
                f"{mine.get(key)!r}; give another --workdir, or its own config"
            )


def is_url(workdir: str | os.PathLike) -> bool:
    """Returns whether a directory is one of a bucket."""
    return "://" in str(workdir)
