"""An ablation whose directory is in a bucket (`gs://...`): a copy on this machine is worked in, and sent cell by cell.

A bucket has no locks and no appending, so nothing runs in it. Whoever finds a cell's result there finds the whole cell.
A cell that its machine was lost with begins again.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import fsspec

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import PLAN, Cell
from mmfusion.errors import UserError


def local(workdir: str, copies: Path) -> tuple[Path, str]:
    """Returns the directory to work in, and the one in a bucket that it stands for: "" for none.

    Args:
      workdir: a local directory or a URL.
      copies: the folder for local directories of those.
    """
    if "://" not in workdir:
        return Path(workdir), ""
    remote = workdir.rstrip("/")
    return copies / hashlib.sha256(remote.encode()).hexdigest()[:16], remote


class Mirror:
    """A local directory, and the one in a bucket that it stands for.

    Args:
      remote: a URL that fsspec knows, such as `gs://bucket/ablation`; "" for none: then nothing is copied.
      local: the directory that is worked in.

    Raises:
      UserError: no such kind of URL, or what reads it is not installed.
    """

    def __init__(self, remote: str, local: Path):
        self._local, self._files, self._remote = local, None, ""
        if remote:
            try:
                self._files, self._remote = fsspec.url_to_fs(remote)
            except (ImportError, ValueError) as error:
                raise UserError(f"--workdir={remote}: {error}; gs:// takes `pip install gcsfs`") from error

    def fetch(self, cells: Sequence[Cell]) -> None:
        """Copies the files of the directory itself, and what is there of cells that ended there and not here.

        What ended here and was not sent, as its machine was lost, is sent.
        """
        if self._files is None:
            return
        self._files.invalidate_cache()  # others write there
        found = self._files.find(self._remote) if self._files.exists(self._remote) else []
        self._drop_another(found)
        self._get([path for path in found if path.rpartition("/")[0] == self._remote])
        for cell in cells:
            here = runner.cell_directory(self._local, cell)
            prefix = f"{self._there(here)}/"
            there = {path.removeprefix(prefix): path for path in found if path.startswith(prefix)}
            done = (here / runner.RESULT).exists()
            if runner.RESULT in there:
                self._get([path for name, path in there.items() if not done or not (here / name).exists()])
            elif done:
                self._put(here.rglob("*"))
            elif runner.FAILED in there and not (here / runner.FAILED).exists():
                self._get(there.values())

    def send(self) -> None:
        """Copies the files of the directory itself: the plan, and what the ablation concludes."""
        if self._files is not None:
            self._put(self._local.iterdir())

    def sending(self, done: Iterator[tuple[Cell, str]]) -> Iterator[tuple[Cell, str]]:
        """Yields what `Pool.run` does, each cell after it is sent."""
        for cell, error in done:
            if self._files is not None:
                folder = runner.cell_directory(self._local, cell)
                self._put(folder.rglob("*"))
                if not error and self._files.exists(failed := self._there(folder / runner.FAILED)):
                    self._files.rm_file(failed)
            yield cell, error

    def _drop_another(self, found: Sequence[str]) -> None:
        """Removes the local directory where it is of another plan than the bucket's, which was begun anew."""
        path = self._local / PLAN
        if not path.exists():
            return
        there = f"{self._remote}/{PLAN}"
        if there in found:
            ours, theirs = json.loads(path.read_text()), json.loads(self._files.cat_file(there))
            cells = [{cell["name"]: cell for cell in one["cells"]} for one in (ours, theirs)]
            alike = all(cells[0][name] == cells[1][name] for name in cells[0].keys() & cells[1].keys())
            if alike and ours["code"] == theirs["code"]:
                return
        shutil.rmtree(self._local)

    def _there(self, path: Path) -> str:
        return f"{self._remote}/{path.relative_to(self._local).as_posix()}"

    def _get(self, paths: Iterable[str]) -> None:
        for path in sorted(paths, key=_result_last):
            here = self._local / path.removeprefix(self._remote).lstrip("/")
            here.parent.mkdir(parents=True, exist_ok=True)
            temporary = here.with_name(f".{here.name}.{uuid.uuid4().hex[:12]}")
            self._files.get_file(path, str(temporary))
            temporary.replace(here)

    def _put(self, paths: Iterable[Path]) -> None:
        files = [path for path in paths if path.is_file() and path.name != runner.LOCK]
        for path in sorted(files, key=_result_last):
            there = self._there(path)
            self._files.makedirs(there.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), there)


def _result_last(path: str | Path) -> bool:
    return str(path).endswith(f"/{runner.RESULT}")
