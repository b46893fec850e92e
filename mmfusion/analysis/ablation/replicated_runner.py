"""Runs the cells of a plan on an accelerator, in this process: those of one method as one program.

Cells of a group differ in seed and learning rate only. On CPU `runner` is faster, with a process for each core.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfusion import config as configs
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.analysis.ablation.runner import Work
from mmfusion.distributed.mesh import stop_on_sigterm
from mmfusion.errors import Preempted
from mmfusion.training.replicas import Replica, replica, train_replicas

NO_MEMORY = "RESOURCE_EXHAUSTED"  # in what XLA says


def run(directory: Path, cells: Sequence[Cell], work: Work = runner.TRAINING) -> Iterator[tuple[Cell, str]]:
    """Works on the cells where that is not done yet, and yields each with "" or the error, as `runner.Pool` does.

    Training takes all cells of a group at once, half of them where the device has not the memory; other work goes
    cell by cell.

    Raises:
      Preempted: SIGTERM came; the cells under way saved themselves.
    """
    waiting = [cell for cell in cells if not runner.is_done(directory, cell, work.leaves)]
    if work is not runner.TRAINING:
        for cell in waiting:
            answer = runner.work_on(cell, directory, work)
            if isinstance(answer, Preempted):
                raise answer
            yield cell, answer
        return
    for group in groups(waiting):
        yield from _train(group, directory)


def groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Returns the cells that one program can train together, in the order of their first ones."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        optim = {key: value for key, value in cell.config["optim"].items() if key != "learning_rate"}
        alike = {**cell.config, "seed": None, "optim": optim}
        found.setdefault(json.dumps(alike, sort_keys=True), []).append(cell)
    return list(found.values())


def _train(cells: list[Cell], directory: Path) -> Iterator[tuple[Cell, str]]:
    folders = [runner.cell_directory(directory, cell) for cell in cells]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(runner.alone(folder))
        stop = stack.enter_context(stop_on_sigterm())
        logs = [stack.enter_context((folder / runner.LOG).open("a")) for folder in folders]
        runs = [_run(cell, folder, stop) for cell, folder in zip(cells, folders, strict=True)]
        try:
            results = train_replicas(runs, lambda i: contextlib.redirect_stdout(logs[i]))
        except Exception as error:  # of the program that they share: other groups go on
            results = [error] * len(cells)
    if len(cells) > 1 and all(NO_MEMORY in str(result) for result in results) and not stop.is_set():
        middle = len(cells) // 2
        for half in (cells[:middle], cells[middle:]):
            yield from _train(half, directory)
        return
    for cell, folder, result in zip(cells, folders, results, strict=True):
        if not isinstance(result, Preempted):
            yield cell, runner.settle(folder, result if isinstance(result, Exception) else None)
    for result in results:
        if isinstance(result, Preempted):
            raise result
    if stop.is_set():  # it came when there was nothing more to save
        raise Preempted("SIGTERM; run the same command again")


def _run(cell: Cell, folder: Path, stop: threading.Event) -> Replica:
    config = configs.from_json(cell.config)
    return (yield from replica(config, folder, stop, runner.dataset_of(cell, config)))
