"""Runs the cells of a plan in several processes, each held to its own processor; any of them may be killed.

A cell is a run directory, and a piece of work on it leaves one file there. Run again, it goes on where it stopped; what
it leaves does not depend on who ran it.
"""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.data.dataset import Dataset, load
from mmfusion.errors import Preempted
from mmfusion.files import write_json

FAILED, LOG, LOCK, RESULT = "failed.json", "log.txt", "lock", "result.json"
PR_SET_PDEATHSIG = 1
MOST_MAPS = 30_000
OPEN = 2  # datasets that a process keeps in memory
_opened: dict[str, Dataset] = {}


@dataclasses.dataclass(frozen=True)
class Work:
    """What is done on a cell.

    Attributes:
      function: of the cell and its folder; importable by name.
      leaves: the file in the folder that is there once it is done.
    """

    function: Callable[[Cell, Path], None]
    leaves: str


def shard(cells: Sequence[Cell], part: str) -> list[Cell]:
    """Returns the share `i/n` of the cells, every n-th from the i-th on; the shares are all cells, each once.

    Raises:
      ValueError: not of the form i/n with 0 <= i < n.
    """
    number, _, count = part.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"{part!r} must be i/n with i from 0 to n - 1, such as 0/4")
    return list(cells[int(number) :: int(count)])


def cell_directory(directory: Path, cell: Cell) -> Path:
    """Returns the run directory of a cell."""
    return directory / "cells" / cell.name


def is_done(directory: Path, cell: Cell, leaves: str = RESULT) -> bool:
    """Returns whether a cell has its result, or another file that work on it leaves."""
    return (cell_directory(directory, cell) / leaves).exists()


def run(
    cells: Sequence[Cell], directory: Path, jobs: int, prepare: Callable[[], None], work: Work | None = None
) -> Iterator[tuple[Cell, str]]:
    """Works on cells in a pool of its own; see `Pool`."""
    with Pool(directory, jobs, prepare) as pool:
        yield from pool.run(cells, work or TRAINING)


class Pool:
    """Processes that stay for several pieces of work.

    Args:
      directory: of the ablation; cells are below `cells/`.
      jobs: processes at the most; each is held to a processor of its own where there are as many.
      prepare: called first in each process; importable by name.
    """

    def __init__(self, directory: Path, jobs: int, prepare: Callable[[], None]):
        self._directory, self._jobs, self._prepare = directory, jobs, prepare
        self._processors = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()

    def run(self, cells: Sequence[Cell], work: Work) -> Iterator[tuple[Cell, str]]:
        """Works on the cells where that is not done yet, and yields each with "" or the error, as they finish.

        Raises:
          Preempted: SIGTERM came; the cells under way saved themselves.
        """
        waiting = [cell for cell in cells if not is_done(self._directory, cell, work.leaves)][::-1]
        for i in range(len(self._workers), min(self._jobs, len(waiting))):
            processor = self._processors[i] if i < len(self._processors) else None
            self._workers.append(_Worker(self._directory, processor, self._prepare))
        for worker in self._workers[: len(waiting)]:
            worker.give(waiting.pop(), work)
        while busy := [worker for worker in self._workers if worker.cell]:
            ready = wait([worker.answers for worker in busy])
            for worker in busy:
                if worker.answers in ready:
                    cell, error = worker.finish()
                    yield cell, error
                    if waiting:
                        worker.give(waiting.pop(), work)


class _Worker:
    """A process that is given a cell at a time, and another one in its place where it dies."""

    def __init__(self, directory: Path, processor: int | None, prepare: Callable[[], None]):
        self.cell: Cell | None = None
        self._directory, self._processor, self._prepare = directory, processor, prepare
        self._start()

    def _start(self) -> None:
        # JAX must not be forked; a new process reads the compiled programs of the others.
        spawn = multiprocessing.get_context("spawn")
        self.answers, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve,
            args=(theirs, self._directory, os.getpid(), self._processor, self._prepare),
            daemon=True,
        )
        self._process.start()
        theirs.close()  # or its end would not be seen here

    def give(self, cell: Cell, work: Work) -> None:
        self.cell = cell
        self.answers.send((cell, work))

    def finish(self) -> tuple[Cell, str]:
        cell, self.cell = self.cell, None
        try:
            answer = self.answers.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            answer = f"its process ended with status {self._process.exitcode}"
            _fail(cell_directory(self._directory, cell), answer)
            self._start()
        if isinstance(answer, Preempted):
            raise answer
        return cell, answer

    def stop(self) -> None:
        """Tells the process to end: it saves what it is at."""
        self.answers.close()
        if self.cell:
            self._process.terminate()

    def join(self) -> None:
        """Waits for the end."""
        self._process.join()


@contextlib.contextmanager
def preempted_by_sigterm() -> Iterator[None]:
    """Raises Preempted, once, where SIGTERM comes; a pool then lets its processes save what they are at."""

    def preempt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Preempted("SIGTERM; the cells under way saved themselves; run the same command again")

    before = signal.signal(signal.SIGTERM, preempt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(
    answers: Connection,
    directory: Path,
    parent: int,
    processor: int | None,
    prepare: Callable[[], None],
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent says what happens
    if sys.platform == "linux":  # end with the parent, even where that is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    prepare()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent has nothing more to give
        while True:
            cell, work = answers.recv()
            answers.send(work_on(cell, directory, work))


def work_on(cell: Cell, directory: Path, work: Work) -> str | Preempted:
    """Returns "", or the error, which `failed.json` keeps, or that SIGTERM came and the cell saved itself."""
    folder = cell_directory(directory, cell)
    with alone(folder), (folder / LOG).open("a") as log, contextlib.redirect_stdout(log):
        try:
            work.function(cell, folder)
        except Preempted as stop:
            return stop
        except Exception as error:  # whatever it was: the other cells go on
            return settle(folder, error)
        finally:
            make_room()
    return settle(folder, None)


def make_room(most: int = MOST_MAPS) -> None:
    """Forgets compiled programs where they took more than so many of the 65,530 memory maps that Linux allows."""
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > most:
        sys.modules["jax"].clear_caches()


def settle(folder: Path, error: Exception | None) -> str:
    """Writes `failed.json` with an error and returns it as a line, or removes that file where there is none."""
    if error is None:
        (folder / FAILED).unlink(missing_ok=True)
        return ""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    _fail(folder, message)
    return message


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes a cell's folder, and waits until no other process of this machine works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train_cell(cell: Cell, folder: Path) -> None:
    """Trains a cell in its folder, or continues it."""
    from mmfusion.training.loop import train

    config = configs.from_json(cell.config)
    train(config, folder, dataset=dataset_of(cell, config))


def dataset_of(cell: Cell, config: ConfigDict) -> Dataset:
    """Returns a cell's data, opened once for all cells in a row that read the same."""
    seed = config.seed if config.data.name.startswith("pair:") else 0  # of pairings alone
    key = json.dumps([cell.config["data"], seed])
    if key not in _opened:
        while len(_opened) >= OPEN:
            del _opened[next(iter(_opened))]
        _opened[key] = load(config.data, seed=config.seed)
    return _opened[key]


def _fail(folder: Path, message: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"error": message})


TRAINING = Work(train_cell, RESULT)
