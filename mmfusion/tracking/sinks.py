"""Where the scalars of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A sink is imported only where `config.tracking` names it. Its package is an optional extra but for TensorBoard.
"""

import contextlib
import importlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mmfusion.errors import UserError, one_line

SINKS = ("tensorboard", "wandb", "mlflow")
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # sink -> its package, and the extra that installs it
PAUSE_SECONDS = 60.0  # after a failure, during which scalars are not sent
CLOSE_SECONDS = 60.0  # that closing may take


class Sink(Protocol):
    """Takes scalars until it is closed; it raises any exception where it cannot."""

    def write_scalars(self, step: int, values: Mapping[str, float], /) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...


def sink_names(tracking: str) -> list[str]:
    """Returns the names in `config.tracking`."""
    return list(filter(None, tracking.split("+")))


def check_tracking(tracking: str) -> None:
    """Raises UserError for a sink that is unknown, named twice, or whose package is not installed."""
    names = sink_names(tracking)
    for name in names:
        if name not in SINKS:
            raise UserError("unknown sink", path="config.tracking", value=name, choices=SINKS)
        if name in PACKAGES and not _is_installed(PACKAGES[name]):
            message = f"needs a package: pip install '.[{name}]' in the repository, or pip install {PACKAGES[name]}"
            raise UserError(message, path="config.tracking", value=name)
    if len(set(names)) < len(names):
        raise UserError("names a sink twice", path="config.tracking", value=tracking)


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # of a module without a spec
        return False
    return spec is not None and spec.origin is not None  # without an origin, it is a folder of that name


def open_sinks(
    config: Mapping[str, Any], workdir: Path, resume_step: int | None, report: Callable[[str], None]
) -> list[Sink]:
    """Returns the sinks of a run.

    Args:
      config: of the run, as JSON values; `tracking` names the sinks.
      workdir: the run's directory, whose name is that of the run.
      resume_step: the step that a resumed run continues from.
      report: prints a line, from any thread.
    """
    sinks: list[Sink] = []
    for name in sink_names(config.get("tracking", SINKS[0])):
        if name == "tensorboard":
            from mmfusion.tracking.tensorboard import EventWriter  # its package imports PyTorch where it is installed

            sinks.append(EventWriter(workdir, resume_step=resume_step))
        else:
            module = importlib.import_module(f"mmfusion.tracking.{name}_sink")
            sinks.append(Background(name, lambda module=module: module.open_sink(workdir, config), report))
    return sinks


class Background:
    """A sink behind a thread, so that training neither waits for a server nor ends with it.

    Scalars that cannot be sent are dropped, as `metrics.jsonl` has them; the first failure is reported.

    Args:
      name: of the sink.
      open_sink: opens it; called in the thread, again after a failure.
      report: prints a line.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], report: Callable[[str], None]):
        self._name, self._open, self._report = name, open_sink, report
        self._queue: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._sink: Sink | None = None
        self._failed = self._reported = False
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._thread.start()

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queues scalars."""
        self._queue.put((step, values))

    def close(self, *, failed: bool = False) -> None:
        """Sends what is queued, for at most `CLOSE_SECONDS`."""
        self._failed = failed
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"not closed after {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        paused_until = 0.0
        while (item := self._queue.get()) is not None:
            if time.monotonic() < paused_until:
                continue
            try:
                self._sink = self._sink or self._open()
                self._sink.write_scalars(*item)
            except Exception as error:  # of the package, of the network, of the server
                self._fail(one_line(error) or type(error).__name__)
                paused_until = time.monotonic() + PAUSE_SECONDS
        if self._sink:
            try:
                self._sink.close(failed=self._failed)
            except Exception as error:
                self._fail(one_line(error) or type(error).__name__)

    def _fail(self, reason: str) -> None:
        if not self._reported:
            self._reported = True
            with contextlib.suppress(Exception):  # it must not end the thread
                reason = f"{reason}; the run goes on, and metrics.jsonl has all metrics"
                self._report(f"train  warning: {self._name}: {reason}")
