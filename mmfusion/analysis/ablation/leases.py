"""Leases: which of several workers runs a trial, where they share the folder or the bucket of an ablation.

A lease is a file `leases/TRIAL.N`, of several the one with the highest N. Files are created where there is none yet
(O_EXCL in a folder, generation 0 in a bucket) and never written again. The holder renews its lease by creating N + 1;
another worker takes over a lease that was not renewed by creating N + 1 itself, and one of them succeeds. Ages are
differences of times that the file system or the bucket gave, so that the clocks of the machines do not matter.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mmfusion.errors import Preempted, storage_errors

FOLDER = "leases"
RENEW, GIVE_UP, STALE = 15.0, 60.0, 90.0  # seconds without renewal until: the next one, the holder stops, it is free
POLL = 3.0  # seconds between two looks at what other workers hold
MAX_NAME = 200  # characters; file systems allow 255
WORKER = re.compile("[0-9a-f]{32}")


class LeaseLost(Preempted):
    """Another worker may run a trial of this one; its processes must write nothing more."""


class Taking(Protocol):
    """How a worker takes trials, by name: `Leases`, or `Unshared` where no other worker runs them."""

    def take(self, groups: Iterable[Sequence[str]]) -> list[str]: ...

    def release(self, names: Iterable[str]) -> None: ...

    def check(self) -> None: ...

    def holding(self, name: str) -> contextlib.AbstractContextManager[None]: ...


class Unshared:
    """Takes trials that no other worker runs, without files."""

    def take(self, groups: Iterable[Sequence[str]]) -> list[str]:
        """Returns the first group, or [] without one."""
        return list(next(iter(groups), []))

    def release(self, names: Iterable[str]) -> None:
        """Does nothing."""

    def check(self) -> None:
        """Does nothing."""

    def holding(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Does nothing."""
        return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class _Lease:
    number: int
    renewed: float  # by time.monotonic, before the file was created


class Leases:
    """The leases of one worker, which a thread renews inside `with`; all are released at the end.

    Args:
      place: the ablation's directory, or its URL in a bucket.

    Raises:
      UserError: the bucket cannot be reached, or nothing reads such a URL.
    """

    def __init__(self, place: str | Path):
        self._url = str(place)
        self._files, root = LocalFileSystem(), str(Path(place).absolute())
        if "://" in self._url:
            with storage_errors(self._url):
                self._files, root = fsspec.url_to_fs(self._url.rstrip("/"))
        self._root = f"{root}/{FOLDER}"
        self._worker = uuid.uuid4().hex
        self._held: dict[str, _Lease] = {}
        self._lost = ""
        self._clock = 0.0  # of the file system, minus time.monotonic
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name="leases", daemon=True)

    def __enter__(self) -> "Leases":
        self._alive = _hold_lock(self._worker)
        with storage_errors(self._url):
            self._files.makedirs(self._root, exist_ok=True)
            path = f"{self._root}/clock.{self._worker}"
            self._create(path)
            self._files.rm_file(path)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join(RENEW)
        with contextlib.suppress(Exception):  # unreleased leases become free by themselves
            self.release(list(self._held))
        _lock_path(self._worker).unlink(missing_ok=True)
        self._alive.close()

    def take(self, groups: Iterable[Sequence[str]]) -> list[str]:
        """Takes what is free of the first group in which something is, and returns the names; [] without one."""
        newest = self._newest()
        free_first = sorted(groups, key=lambda group: all(_key(name) in newest for name in group))
        for group in free_first:
            if taken := [name for name in group if self._take(_key(name), newest)]:
                return taken
        return []

    def release(self, names: Iterable[str]) -> None:
        """Gives up leases; those that are not held are ignored."""
        for key in map(_key, names):
            with self._lock:
                if lease := self._held.pop(key, None):
                    self._remove(key, lease.number)

    def check(self) -> None:
        """Raises LeaseLost if a lease was lost, or could not be renewed for so long that it soon will be."""
        limit = time.monotonic() - GIVE_UP
        late = [key for key, lease in list(self._held.items()) if lease.renewed < limit]
        if name := self._lost or "".join(late[:1]):
            raise LeaseLost(
                f"the lease of {name} could not be renewed for {GIVE_UP:.0f} s, so that another worker may run it; "
                "the running trials were killed; run the same command again"
            )

    @contextlib.contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Waits until the lease is free, and holds it inside `with`."""
        while not self.take([[name]]):
            time.sleep(POLL)
        try:
            yield
        finally:
            self.release([name])

    def renew(self) -> None:
        """Renews every lease that is held; those that another worker took over are lost."""
        for key in list(self._held):
            with self._lock:
                if (lease := self._held.get(key)) and not self._renewed(key, lease.number):
                    del self._held[key]
                    self._lost = key

    def _renewed(self, key: str, number: int) -> bool:
        # The next number may be this worker's already, if an error followed its creation.
        return number <= self._newest().get(key, 0) <= number + 1 and self._create_lease(key, number + 1)

    def _keep_renewing(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(Exception):  # tried again; `check` gives up when it fails for too long
                self.renew()

    def _take(self, key: str, newest: dict[str, int]) -> bool:
        number = newest.get(key, 0)
        if number and not self._is_free(f"{self._root}/{key}.{number}"):
            return False
        with self._lock:
            return self._create_lease(key, number + 1)

    def _is_free(self, path: str) -> bool:
        """Returns whether a lease was not renewed in time, or its worker ran on this machine and has ended."""
        try:
            age = self._now() - self._files.modified(path).timestamp()
            return age > STALE or _has_ended(self._read(path).decode(errors="replace"))
        except FileNotFoundError:  # renewed or released meanwhile
            return False

    def _now(self) -> float:
        """Returns the time of the file system's clock."""
        return time.monotonic() + self._clock

    def _create_lease(self, key: str, number: int) -> bool:
        """Creates the next file of a lease; returns whether it did, and no other is ahead."""
        start = time.monotonic()
        if not self._create(f"{self._root}/{key}.{number}"):
            return False
        if self._newest().get(key) != number:  # the number was long past
            self._remove(key, number)
            return False
        self._held[key] = _Lease(number, start)
        self._remove(key, number - 1)
        return True

    def _create(self, path: str) -> bool:
        content = self._worker.encode()
        try:
            if isinstance(self._files, LocalFileSystem):
                with open(path, "xb") as file:
                    file.write(content)
            else:
                self._files.pipe_file(path, content, mode="create")
        except FileExistsError:
            # A client that lost the answer repeats its request, and then finds its own file.
            with contextlib.suppress(FileNotFoundError):
                return self._read(path) == content
            return False
        self._clock = self._files.modified(path).timestamp() - time.monotonic()
        return True

    def _read(self, path: str) -> bytes:
        content = self._files.cat_file(path)
        assert isinstance(content, bytes)
        return content

    def _newest(self) -> dict[str, int]:
        """Returns the highest number of each lease."""
        newest: dict[str, int] = {}
        self._files.invalidate_cache()  # other workers write there
        with contextlib.suppress(FileNotFoundError):  # a bucket has no empty folders
            for path in self._files.ls(self._root, detail=False):
                key, _, number = str(path).rpartition("/")[2].rpartition(".")
                if number.isdecimal():
                    newest[key] = max(newest.get(key, 0), int(number))
        return newest

    def _remove(self, key: str, number: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{key}.{number}")


def _key(name: str) -> str:
    """Returns the name of a lease's files, short enough for a number after it."""
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _lock_path(worker: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mmfusion-worker-{worker}.lock"


def _hold_lock(worker: str) -> IO[str]:
    """Returns an open file on this machine that is locked until the process ends, however it ends."""
    file = _lock_path(worker).open("x")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _has_ended(worker: str) -> bool:
    """Returns whether a worker was killed on this machine; False where that is not known."""
    if not WORKER.fullmatch(worker):
        return False
    try:
        with _lock_path(worker).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:  # it is locked, or on another machine
        return False
