"""Commands in processes that have imported JAX already: for a short command that is most of the time."""

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["mmfusion.training.loop", "mmfusion.analysis.probing.probe", "experiments.cli"])


class Started:
    """`python -m MODULE ARGUMENT ...` as it runs, with what the tests use of `subprocess.Popen`.

    Args:
      module: as after `python -m`, in the repository's root.
      argv: its arguments.
      merged: both outputs are one text, as in a terminal.
      environment: variables that it has beside this process's; those that JAX reads as it is imported come too late.
    """

    def __init__(self, module: str, argv: Sequence[str], *, merged: bool = False, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name, name) for name in (("both", "both") if merged else ("out", "err"))]
        self._process = CONTEXT.Process(
            target=_run, args=(module, list(argv), self._texts, {**os.environ, **environment})
        )
        self._process.start()

    def poll(self) -> int | None:
        """Returns its exit status, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it, as by `kill -9`."""
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for its end and returns what it printed; raises TimeoutError where that lasts too long."""
        self._process.join(timeout)
        said = tuple(path.read_text() if path.exists() else "" for path in self._texts)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still at work after {timeout} seconds, having said {said}")
        return said


def _run(module: str, argv: list[str], texts: list[Path], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.argv = [module, *argv]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
