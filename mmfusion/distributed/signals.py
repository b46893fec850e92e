"""What SIGTERM and Ctrl-C (SIGINT) do to a process that trains.

Python runs a signal handler between two bytecodes, so not before a compilation ends, which is one long native call. A
command is therefore also watched by a thread, which Python tells of a signal at once through a pipe.
"""

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from mmfusion.distributed import coordination, hosts
from mmfusion.errors import StoppedEarly

GRACE = 3.0  # seconds to clean up in, for a process that is asked to stop before its first step
TRY_AGAIN, INTERRUPTED = 75, 130  # exit statuses
EARLY = "stopped before a step was taken; run the same command to continue"
may_exit = threading.Event()  # set where a signal may end this process: that of a command, and not a notebook


class Stop(threading.Event):
    """Set once the run is asked to stop.

    Attributes:
      stepping: whether this process has taken a step. Before, a signal ends the run at once; from then on, the current
        step ends and the run is saved.
    """

    stepping = False

    def after_step(self) -> None:
        """Notes that a step was taken; from the first one on, JAX handles SIGTERM on several hosts and tells all."""
        if not self.stepping:
            self.stepping = True
            if hosts.is_multihost():
                coordination.start_preemption_service()


@contextlib.contextmanager
def handled(stop: Stop) -> Iterator[None]:
    """Handles SIGTERM and SIGINT in the body, which the main thread runs; a process that ignores SIGINT goes on so.

    Raises:
      StoppedEarly: a signal came before the first step.
      KeyboardInterrupt: a second SIGINT.
    """
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, functools.partial(_handle, stop)) for number in numbers}
    try:
        with _watched(stop):
            yield
    except KeyboardInterrupt:
        if stop.stepping:
            raise
        raise StoppedEarly(EARLY) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: a handler of another language


def _handle(stop: Stop, number: int, frame: Any) -> None:
    again = stop.is_set()
    stop.set()
    if again and number == signal.SIGINT:
        raise KeyboardInterrupt
    if not again and not stop.stepping:
        raise KeyboardInterrupt  # as no `except Exception` of a library catches it
    if not again and number == signal.SIGINT and hosts.is_multihost():
        signal.raise_signal(signal.SIGTERM)  # to JAX's handler


@contextlib.contextmanager
def _watched(stop: Stop) -> Iterator[None]:
    """Ends a command in the body within seconds of a signal, whatever its main thread does; see `_watch`."""
    if not may_exit.is_set():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(stop, reading), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


def _watch(stop: Stop, reading: int) -> None:
    """Exits on the second SIGINT at once, and `GRACE` seconds after a signal that came before the first step.

    Where the body of `_watched` is left meanwhile, what comes after it has the rest of that time.
    """
    asked, deadline = False, None
    while deadline is None or time.monotonic() < deadline:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            break
        byte = os.read(reading, 1)
        if not byte:  # the body is left
            os.close(reading)
            if deadline is None:
                return
            time.sleep(max(0.0, deadline - time.monotonic()))
            os._exit(TRY_AGAIN)
        if byte[0] in (signal.SIGTERM, signal.SIGINT):
            if asked and byte[0] == signal.SIGINT:
                _exit(INTERRUPTED, "interrupted: ended at once; the newest checkpoint is kept")
            if not asked and not stop.stepping:
                deadline = time.monotonic() + GRACE
                threading.Thread(target=hosts.tell_others, args=(TRY_AGAIN, EARLY), daemon=True).start()
            asked = True
    _exit(TRY_AGAIN, f"preempted: {EARLY}")


def _exit(status: int, message: str) -> None:
    os.write(2, f"{message}\n".encode())  # the main thread may be in the middle of a `print`
    os._exit(status)
