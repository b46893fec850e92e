"""Runs the cells of a plan in several processes, each held to its own processor; any of them may be killed.

A cell is a run directory. Run again, it goes on where it stopped; what it leaves does not depend on who ran it.
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

from mmfusion.analysis.plan import Cell
from mmfusion.errors import Preempted
from mmfusion.logger import write_json

FAILED, LOG, LOCK = "failed.json", "log.txt", "lock"
PR_SET_PDEATHSIG = 1


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


def is_done(directory: Path, cell: Cell) -> bool:
    """Returns whether a cell has its result."""
    return (cell_directory(directory, cell) / "result.json").exists()


def run(cells: Sequence[Cell], directory: Path, jobs: int, prepare: Callable[[], None]) -> Iterator[tuple[Cell, str]]:
    """Runs the cells that have no result yet, and yields each with "" or the error that ended it, as they finish.

    Args:
      cells: of the plan.
      directory: of the ablation; cells are below `cells/`.
      jobs: processes; each is held to a processor of its own where there are as many.
      prepare: called first in each process; importable by name.

    Raises:
      Preempted: SIGTERM came; the cells under way saved themselves.
    """
    waiting = [cell for cell in cells if not is_done(directory, cell)][::-1]
    processors = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    workers = [
        _Worker(directory, processors[i] if i < len(processors) else None, prepare)
        for i in range(min(jobs, len(waiting)))
    ]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while busy := [worker for worker in workers if worker.cell]:
            ready = wait([worker.answers for worker in busy])
            for worker in busy:
                if worker.answers in ready:
                    cell, error = worker.finish()
                    yield cell, error
                    if waiting:
                        worker.give(waiting.pop())
    finally:
        for worker in workers:
            worker.end()


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
            target=_serve, args=(theirs, self._directory, os.getpid(), self._processor, self._prepare), daemon=True
        )
        self._process.start()
        theirs.close()  # or its end would not be seen here

    def give(self, cell: Cell) -> None:
        self.cell = cell
        self.answers.send(cell)

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

    def end(self) -> None:
        """Lets a process that has nothing to do end, and saves what the others are at."""
        self.answers.close()
        if self.cell:
            self._process.terminate()
        self._process.join()


def _serve(
    answers: Connection, directory: Path, parent: int, processor: int | None, prepare: Callable[[], None]
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
            answers.send(run_cell(answers.recv(), directory))


def run_cell(cell: Cell, directory: Path) -> str | Preempted:
    """Trains a cell, or continues it.

    Returns:
      "", or the error, which `failed.json` keeps, or that SIGTERM came and the cell saved itself.
    """
    from mmfusion import config as configs
    from mmfusion.train import train

    folder = cell_directory(directory, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / LOCK), (folder / LOG).open("a") as log, contextlib.redirect_stdout(log):
        try:
            train(configs.from_json(cell.config), folder)
        except Preempted as stop:
            return stop
        except Exception as error:  # whatever it was: the other cells go on
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _fail(folder, message)
            return message
    (folder / FAILED).unlink(missing_ok=True)
    return ""


def _fail(folder: Path, message: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"error": message})


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process of this machine holds the file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
