"""An ablation whose directory is in a bucket (`gs://...`) runs in a local copy and uploads each finished trial.

A bucket supports neither locks nor appending, so no trial runs in it. The result is a trial's last file to be uploaded.
A trial that was running when its machine was lost is restarted.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import PLAN, Trial
from mmfusion.files import RemoteFolder


def local_directory(workdir: str, copies: Path) -> tuple[Path, str]:
    """Returns the local directory, and the URL that it is a copy of ("": none).

    Args:
      workdir: a local directory or a URL.
      copies: the folder for local copies.
    """
    if "://" not in workdir:
        return Path(workdir), ""
    url = workdir.rstrip("/")
    return copies / hashlib.sha256(url.encode()).hexdigest()[:16], url


class RemoteCopy:
    """Synchronises the local directory of an ablation with a bucket.

    Args:
      url: a URL that fsspec supports, such as `gs://bucket/ablation`; "": nothing is copied.
      local: the directory that the ablation runs in.

    Raises:
      UserError: fsspec does not support the URL, or its package is not installed.
    """

    def __init__(self, url: str, local: Path):
        self._local = local
        self._remote = RemoteFolder(url, local) if url else None

    def fetch(self, trials: Sequence[Trial]) -> None:
        """Downloads the ablation's own files and the trials that other machines finished.

        Uploads finished trials that the bucket lacks because the process was killed before the upload.
        """
        if self._remote is None:
            return
        names = self._remote.names()
        self._drop_other_plan(names)
        self._remote.download([name for name in names if "/" not in name])
        for trial in trials:
            self._fetch_trial(trial, names)

    def fetch_trial(self, trial: Trial) -> None:
        """Downloads a trial, if another machine has finished it."""
        if self._remote is not None:
            self._fetch_trial(trial, self._remote.names(self._name(runner.trial_directory(self._local, trial))))

    def upload(self) -> None:
        """Uploads the ablation's own files: the plan, the tables and the report."""
        if self._remote is not None:
            self._remote.upload(self._local.iterdir())

    def upload_trial(self, trial: Trial, error: str) -> None:
        """Uploads the files of a trial that ended, with "" or its error."""
        if self._remote is not None:
            folder = runner.trial_directory(self._local, trial)
            self._upload(folder)
            if not error:
                self._remote.remove(self._name(folder / runner.FAILED))

    def _fetch_trial(self, trial: Trial, names: Sequence[str]) -> None:
        assert self._remote is not None
        folder = runner.trial_directory(self._local, trial)
        done = (folder / runner.RESULT).exists()
        prefix = self._name(folder) + "/"
        remote = [name for name in names if name.startswith(prefix)]
        if prefix + runner.RESULT in remote:
            self._remote.download([name for name in remote if not done or not (self._local / name).exists()])
        elif done:
            self._upload(folder)
        elif prefix + runner.FAILED in remote and not (folder / runner.FAILED).exists():
            self._remote.download(remote)

    def _upload(self, folder: Path) -> None:
        assert self._remote is not None
        self._remote.upload(path for path in folder.rglob("*") if path.name != runner.LOCK)

    def _drop_other_plan(self, names: Sequence[str]) -> None:
        """Removes the local directory if its plan conflicts with the bucket's, as another ablation started there."""
        path = self._local / PLAN
        if self._remote is None or not path.exists():
            return
        if PLAN in names:
            local, remote = json.loads(path.read_text()), json.loads(self._remote.read(PLAN))
            ours, others = ({trial["name"]: trial for trial in plan["trials"]} for plan in (local, remote))
            if local["code"] == remote["code"] and all(ours[name] == others[name] for name in ours.keys() & others):
                return
        shutil.rmtree(self._local)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._local).as_posix()
