"""The hosts of one run: they join, have one config, and where one fails the others end, too, and say why."""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax._src import distributed  # the service that hosts meet at has no other way in
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfusion.errors import UserError

FAILED = "mmfusion/failed"  # what the service knows the first failure by
EVERY = 1.0  # seconds after which a host looks again whether another one has failed
BEHIND = 3600  # seconds that hosts may be apart when they meet, as where one prepares data
ALIVE = 30  # seconds without a sign of life, after which a host counts as lost
GRACE = 5 * EVERY  # seconds that host 0, whose service it is, leaves the others to read why
PARTING = ALIVE / 3  # seconds for JAX's own end: with less than half, nobody counts as lost in it
LOST_HOST_STATUS = (
    134  # exit status where another host is: as of a process that JAX aborts for that, which a script runs again
)
# Words of what Gloo, XLA and the service that hosts meet at say of it.
GONE = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "oordination service", "Connection reset")
_meetings = itertools.count()  # as many on every host


def initialize(where: str) -> None:
    """Joins the other hosts of a run; to be called before JAX looks for devices.

    Args:
      where: `auto` where the machine knows (Cloud TPU, Slurm), or `HOST:PORT,PROCESS,PROCESSES`, the address of process
        0, which one this is, and how many there are; empty: there are no others.

    Raises:
      UserError: it is neither, or the others do not come.
    """
    if not where:
        return
    given = {}
    if where != "auto":
        try:
            address, process, processes = where.split(",")
            int(address.rpartition(":")[2])
            given = {"coordinator_address": address, "process_id": int(process), "num_processes": int(processes)}
        except ValueError:
            raise UserError(f"--distributed={where} is neither auto nor HOST:PORT,PROCESS,PROCESSES") from None
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=ALIVE)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed={where}: {' '.join(str(error).split())[:300]}") from error
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), daemon=True)
    watcher.start()

    def stop_watching() -> None:  # a thread that is in JAX's own code when Python ends would abort the process
        done.set()
        watcher.join()

    atexit.register(stop_watching)  # and runs before what JAX has registered, which leaves the others


def is_multihost() -> bool:
    """Returns whether this process has joined others."""
    return (distributed.global_state.num_processes or 1) > 1


def is_lost_host_error(error: BaseException) -> bool:
    """Returns whether an error of one of several hosts says that another one is not there any more."""
    return is_multihost() and isinstance(error, RuntimeError) and any(word in str(error) for word in GONE)


def abort_all(status: int, said: str) -> None:
    """Ends this process where it failed and is one of several, whose others wait for it: they end with what it said."""
    service = distributed.global_state
    if not is_multihost():
        return
    with contextlib.suppress(Exception):  # another one was first, or the service is gone
        service.client.key_value_set(FAILED, json.dumps([service.process_id, status, said]))
    _end(status)


def _watch(done: threading.Event) -> None:
    service = distributed.global_state
    while not done.wait(EVERY):
        try:
            host, status, said = json.loads(service.client.key_value_try_get(FAILED))
        except Exception:  # nobody has, or the run is at its end
            continue
        if host != service.process_id:
            print(f"error: host {host} failed, and this one ends with it: {said}", file=sys.stderr)
            _end(status)
        return


def _end(status: int) -> None:
    """Ends without what JAX does at its end, which waits for all hosts; host 0 last, or the others would abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    silent = os.open(os.devnull, os.O_WRONLY)  # why is said; what comes of the others' end is not
    for stream in (1, 2):
        os.dup2(silent, stream)
    time.sleep(GRACE if distributed.global_state.process_id == 0 else 2 * EVERY)
    os._exit(status)


def barrier() -> None:
    """Waits until all hosts are here: what one of them has written before, the others can read then."""
    if is_multihost():
        distributed.global_state.client.wait_at_barrier(f"mmfusion/{next(_meetings)}", BEHIND * 1000)


def shutdown_barrier() -> None:
    """Waits until all hosts have done everything; this one has, then, whatever becomes of the others as JAX ends.

    JAX's own end waits for a lost host, for up to five minutes, or aborts this one.
    """
    if is_multihost():
        barrier()
        sys.stdout.flush()
        end = threading.Timer(PARTING, os._exit, [0])
        end.daemon = True
        end.start()


@contextlib.contextmanager
def primary_first() -> Iterator[None]:
    """What is within, the first host does first, and then the others."""
    if jax.process_index():
        barrier()
    yield
    if not jax.process_index():
        barrier()


def broadcast_from_primary(number: int) -> int:
    """Returns the first host's number; all hosts must ask."""
    return int(allgather(np.array(number, np.int32))[0]) if is_multihost() else number


def check_shared(folder: Path) -> None:
    """Raises UserError on hosts for which a folder is not the first host's."""
    if not is_multihost():
        return
    token, path = broadcast_from_primary(secrets.randbits(31)), folder / ".shared"
    with primary_first():
        if not jax.process_index():
            path.write_text(str(token), encoding="utf-8")
        if not path.exists() or path.read_text(encoding="utf-8") != str(token):
            raise UserError(f"{folder} is not what it is on the first host: give all hosts a folder that they share")
    barrier()
    if not jax.process_index():
        path.unlink()


def connect(mesh: Mesh) -> None:
    """Waits for all hosts of a mesh, and on CPU connects its devices.

    There the first sum over some devices gives up on a host that is 30 seconds behind, as one that still compiles its
    step may be; later ones wait.
    """
    if not is_multihost():
        return
    barrier()
    if mesh.devices.flat[0].platform == "cpu":
        axes = mesh.axis_names
        subsets = [some for n in range(1, len(axes) + 1) for some in itertools.combinations(axes, n)]
        left = tuple(PartitionSpec(*(None if axis in some else axis for axis in axes)) for some in subsets)
        whole = PartitionSpec(*axes)
        sums = jax.shard_map(
            lambda x: tuple(jax.lax.psum(x, s) for s in subsets), mesh=mesh, in_specs=whole, out_specs=left
        )
        ones = np.ones(mesh.devices.shape, np.float32)
        one_each = jax.make_array_from_callback(ones.shape, NamedSharding(mesh, whole), lambda part: ones[part])
        jax.block_until_ready(jax.jit(sums)(one_each))


def allgather(own: np.ndarray) -> np.ndarray:
    """Returns every host's array of one shape, `[hosts, ...]`; all hosts must ask."""
    return np.asarray(multihost_utils.process_allgather(own)).reshape(-1, *own.shape)


def check_same(described: str, what: str) -> None:
    """Raises UserError on every host where hosts have different things, such as configs; `what` names them."""
    if jax.process_count() > 1:
        digest = np.frombuffer(hashlib.sha256(described.encode()).digest(), np.uint8)
        every = allgather(digest)
        if others := [host for host in range(len(every)) if (every[host] != every[0]).any()]:
            raise UserError(f"hosts {', '.join(map(str, others))} have another {what} than host 0: give all the same")
