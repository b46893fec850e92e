"""Guarantees of the markers `unit`, `loop` and `process`, and a record of what a test started."""

import multiprocessing.process
import subprocess
import sys
from pathlib import Path
from typing import Any

RULED_OUT = {"unit": {"training", "process"}, "loop": {"process"}, "process": set()}
NAMES = RULED_OUT.keys()
HELPERS = {"git", "uname", "lscpu"}  # short commands that describe the code and the machine

started: list[str] = []  # by the current test: "training" or "process" with details
_watching: set[str] = set()


def watch() -> None:
    """Starts to record in `started` each process and each training run of this process."""
    if _watching:
        return
    _watching.add("started")
    _record(subprocess.Popen, "__init__", _command)
    _record(multiprocessing.process.BaseProcess, "start", lambda process: f"process {process.name}")
    from mmfusion.data import pipeline

    original = pipeline.train_batches

    def train_batches(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        if caller.startswith(("mmfusion.training.", "tests.spoiled")):
            started.append(f"training in {caller}")
        return original(*args, **kwargs)

    pipeline.train_batches = train_batches


def _command(_: Any, args: Any, *more: Any, **options: Any) -> str | None:
    program = args if isinstance(args, (str, bytes, Path)) else args[0]
    return None if Path(str(program)).name in HELPERS else f"process {program}"


def _record(owner: type, name: str, describe: Any) -> None:
    original = getattr(owner, name)

    def method(self: Any, *args: Any, **options: Any) -> Any:
        if description := describe(self, *args, **options):
            started.append(description)
        return original(self, *args, **options)

    setattr(owner, name, method)
