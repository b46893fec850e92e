"""The hosts of one run: they connect, check that they agree, and all stop when one of them fails."""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfusion.distributed import coordination, rendezvous
from mmfusion.errors import UserError

FAILURE_KEY = "mmfusion/failed"  # key of the first failure in the coordination service
POLL_SECONDS = 1.0  # between two looks for a failure of another host
BARRIER_TIMEOUT = 3600  # seconds that hosts may be apart at a barrier, as where one of them prepares the dataset
HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a host counts as lost
ABORT_DELAY = 5 * POLL_SECONDS  # seconds that the primary host, which runs the service, waits for the others
SHUTDOWN_TIMEOUT = HEARTBEAT_TIMEOUT / 3  # seconds for JAX's own shutdown; below half of the heartbeat, no host is lost
LOST_HOST_STATUS = 134  # exit status where another host was lost: that of a process that JAX aborts for this reason
# Parts of the messages of Gloo, XLA and the coordination service for it.
LOST_HOST_MESSAGES = (
    "Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "oordination service", "Connection reset",
)  # fmt: skip
SHOWN = 5  # differences between hosts in an error
_barrier_numbers = itertools.count()  # the same on every host


def initialize(distributed: str) -> None:
    """Connects this process to the other hosts of a run; call it before JAX looks for devices.

    Args:
      distributed: `auto` where JAX can find the others itself (Cloud TPU, Slurm), `HOST:PORT,PROCESS,PROCESSES` (the
        address of process 0, the index of this process, and their number), or empty for a single host.

    Raises:
      UserError: it is none of these, or the other hosts do not connect; see `rendezvous.meet`.
    """
    if not distributed:
        return
    arguments = {}
    if distributed != "auto":
        place = rendezvous.parse(distributed)
        rendezvous.meet(place)
        arguments = {
            "coordinator_address": f"{place.host}:{place.port}", "process_id": place.process,
            "num_processes": place.processes,
        }  # fmt: skip
    if jax.config.values["jax_platforms"] == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's handler would wait for this native call
    try:
        coordination.connect(**arguments, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(" ".join(str(error).split())[:300], path="--distributed", value=distributed) from error
    finally:
        signal.signal(signal.SIGINT, interrupt)
    stop = threading.Event()
    watcher = threading.Thread(target=_abort_with_others, args=(stop,), daemon=True)
    watcher.start()

    def stop_watching() -> None:  # a thread inside JAX's native code while Python exits would abort the process
        stop.set()
        watcher.join()

    atexit.register(stop_watching)  # runs before JAX's own handler, which disconnects


def is_multihost() -> bool:
    """Returns whether this process is connected to other hosts."""
    return coordination.num_hosts() > 1


def is_lost_host_error(error: BaseException) -> bool:
    """Returns whether an error says that another host is no longer there."""
    message = str(error)
    return is_multihost() and isinstance(error, RuntimeError) and any(part in message for part in LOST_HOST_MESSAGES)


def abort_all(status: int, message: str) -> None:
    """Ends this process after a failure and has all other hosts end with its message; returns on a single host."""
    if is_multihost():
        tell_others(status, message)
        _exit(status)


def tell_others(status: int, message: str) -> None:
    """Has all other hosts, if any, end with a message and an exit status."""
    if is_multihost():
        with contextlib.suppress(Exception):  # another host failed first, or the service is gone
            coordination.set_once(FAILURE_KEY, json.dumps([coordination.host_index(), status, message]))


def _abort_with_others(stop: threading.Event) -> None:
    """Ends this process once another host has failed."""
    while not stop.wait(POLL_SECONDS):
        try:
            host, status, message = json.loads(coordination.try_get(FAILURE_KEY))
        except Exception:  # no host has failed, or the run is shutting down
            continue
        if host != coordination.host_index():
            print(f"error: host {host} failed, so this host stops too: {message}", file=sys.stderr)
            _exit(status)
        return


def _exit(status: int) -> None:
    """Exits without JAX's shutdown, which waits for all hosts; the primary host last, or the others would abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    devnull = os.open(os.devnull, os.O_WRONLY)  # the reason is printed; messages about the other hosts would hide it
    for stream in (1, 2):
        os.dup2(devnull, stream)
    time.sleep(ABORT_DELAY if coordination.host_index() == 0 else 2 * POLL_SECONDS)
    os._exit(status)


def barrier() -> None:
    """Waits for all hosts; files that one of them wrote before can then be read by the others."""
    if is_multihost():
        coordination.wait_at_barrier(f"mmfusion/{next(_barrier_numbers)}", BARRIER_TIMEOUT)


def shutdown_barrier() -> None:
    """Waits for all hosts at the end of a command, which then succeeds whatever happens to the others.

    JAX's own shutdown waits up to five minutes for a lost host, or aborts this process.
    """
    if is_multihost():
        barrier()
        sys.stdout.flush()
        timer = threading.Timer(SHUTDOWN_TIMEOUT, os._exit, [0])
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
    """Runs the body on the primary host first, and then on the others."""
    if jax.process_index():
        barrier()
    yield
    if not jax.process_index():
        barrier()


def broadcast_from_primary(value: int) -> int:
    """Returns the int32 value of the primary host; all hosts must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check_shared(folder: Path) -> None:
    """Raises UserError on hosts whose folder is not the one of the primary host."""
    if not is_multihost():
        return
    token, path = broadcast_from_primary(secrets.randbits(31)), folder / ".shared"
    with primary_first():
        if not jax.process_index():
            path.write_text(str(token), encoding="utf-8")
        if not path.exists() or path.read_text(encoding="utf-8") != str(token):
            raise UserError("not the same folder as on host 0: give all hosts a shared folder", path=str(folder))
    barrier()
    if not jax.process_index():
        path.unlink()


def connect(mesh: Mesh) -> None:
    """Waits for all hosts of a mesh, and on CPU connects its devices.

    On CPU the first sum over a set of devices fails where a host is 30 seconds late, as one that still compiles its
    step may be; later sums wait.
    """
    if not is_multihost():
        return
    barrier()
    if mesh.devices.flat[0].platform == "cpu":
        axes = mesh.axis_names
        subsets = [subset for n in range(1, len(axes) + 1) for subset in itertools.combinations(axes, n)]
        out_specs = tuple(PartitionSpec(*(None if axis in subset else axis for axis in axes)) for subset in subsets)
        all_axes = PartitionSpec(*axes)
        sums = jax.shard_map(
            lambda x: tuple(jax.lax.psum(x, subset) for subset in subsets),
            mesh=mesh, in_specs=all_axes, out_specs=out_specs,
        )  # fmt: skip
        ones = np.ones(mesh.devices.shape, np.float32)
        sharded = jax.make_array_from_callback(ones.shape, NamedSharding(mesh, all_axes), lambda index: ones[index])
        jax.block_until_ready(jax.jit(sums)(sharded))


def allgather(array: np.ndarray) -> np.ndarray:
    """Returns the arrays of all hosts, `[hosts, ...]`; all hosts must call it with one shape."""
    return np.asarray(multihost_utils.process_allgather(array)).reshape(-1, *array.shape)


def check_same(value: str, name: str) -> None:
    """Raises UserError on all hosts where a value, such as a config as JSON, is not the same on each of them.

    Args:
      value: as text.
      name: what the error calls it.
    """
    if jax.process_count() == 1:
        return
    digests = allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))  # [hosts, 32]
    if different := [str(host) for host, digest in enumerate(digests) if (digest != digests[0]).any()]:
        raise UserError(f"hosts {', '.join(different)} have another {name} than host 0: give all hosts the same one")


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises UserError on all hosts where a fact is not the same on each of them, with what differs.

    Args:
      facts: by name, such as the version of a package; JSON values.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(facts, sort_keys=True).encode(), np.uint8)
    size = int(allgather(np.array([len(text)], np.int32)).max())
    padded = allgather(np.pad(text, (0, size - len(text))))  # [hosts, size]
    first, *others = (json.loads(row.tobytes().rstrip(b"\0")) for row in padded)
    lines = [
        f"{name} is {other.get(name)} on host {host} and {first.get(name)} on host 0"
        for host, other in enumerate(others, 1)
        for name in sorted({*first, *other})
        if other.get(name) != first.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise UserError(f"the hosts differ: {'; '.join(lines[:SHOWN])}{more}: give all hosts the same code and data")
