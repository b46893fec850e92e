"""Stops a run on SIGTERM, which clusters send before they take a machine away, and on Ctrl-C."""

import contextlib
import threading
from collections.abc import Iterator

from mmfusion.distributed import signals


@contextlib.contextmanager
def stop_on_signal() -> Iterator[signals.Stop]:
    """Yields an event that a signal sets, so that the current step ends and the run is saved.

    Raises:
      StoppedEarly: the signal came before the first step.
      KeyboardInterrupt: a second Ctrl-C.
    """
    stop = signals.Stop()
    handled = threading.current_thread() is threading.main_thread()  # no other thread may handle signals
    with signals.handled(stop) if handled else contextlib.nullcontext():
        yield stop
