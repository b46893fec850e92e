"""Commands in processes that have already imported JAX, because the import dominates a short command."""

import atexit
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
    """A running `python -m MODULE ARGUMENT ...`, with the part of the `subprocess.Popen` interface that tests use.

    Args:
      module: the module, run in the repository's root.
      argv: its arguments.
      merged: whether stdout and stderr are one text, as in a terminal.
      environment: variables added to this process's; those that JAX reads on import have no effect.
    """

    def __init__(self, module: str, argv: Sequence[str], *, merged: bool = False, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._texts = [Path(self._folder.name, name) for name in (("both", "both") if merged else ("out", "err"))]
        self._process = CONTEXT.Process(
            target=_run, args=(module, list(argv), self._texts, {**os.environ, **environment})
        )
        self._process.start()

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process."""
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Kills the process, as `kill -9` does."""
        self._process.kill()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits for the process and returns (stdout, stderr); raises TimeoutError after `timeout` seconds."""
        self._process.join(timeout)
        outputs = tuple(path.read_text() if path.exists() else "" for path in self._texts)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} seconds, with output {outputs}")
        return outputs


def _run(module: str, argv: list[str], texts: list[Path], environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.argv = [module, *argv]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # or JAX does not shut down, and the first host to end aborts the others
