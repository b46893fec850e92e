"""Stops a run on SIGTERM, which clusters send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, so that the current step ends and the run is saved."""
    stop = threading.Event()
    # With several hosts JAX handles the signal and tells all of them, see `Partitioner.should_stop`.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
