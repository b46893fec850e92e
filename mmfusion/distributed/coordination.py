"""The coordination service of `jax.distributed`: the only file that uses private parts of another package.

All of them are attributes of `jax._src.distributed.global_state`, which have no public counterpart:

- `num_processes`, `process_id`: known before JAX has devices. `jax.process_count()` and `jax.process_index()` start the
  backend, which waits for all hosts, and so cannot be asked while a host reports an error.
- `client.wait_at_barrier`: a barrier with a timeout that needs no devices. `multihost_utils.sync_global_devices` sums
  over all devices, and Gloo gives up on a host that is 30 seconds late.
- `client.key_value_set`, `client.key_value_try_get`: tell other hosts why one of them failed, whatever they are doing.
- `initialize_preemption_sync_manager`: lets JAX take over SIGTERM only once a run has taken a step.
"""

from typing import Any

import jax
from jax._src import distributed

_SERVICE = "jax_enable_preemption_service"


def num_hosts() -> int:
    """Returns the number of connected hosts, 1 where `jax.distributed` is not initialized."""
    return distributed.global_state.num_processes or 1


def host_index() -> int:
    """Returns the index of this host, 0 on the primary one."""
    return distributed.global_state.process_id


def start_preemption_service() -> None:
    """Has JAX handle SIGTERM from now on, and tell all hosts; `connect` leaves that out."""
    jax.config.update(_SERVICE, True)
    if distributed.global_state.preemption_sync_manager is None:  # a process may train several times
        distributed.global_state.initialize_preemption_sync_manager()


def connect(**arguments: Any) -> None:
    """Connects this process to the others as `jax.distributed.initialize` does, but leaves SIGTERM alone."""
    jax.config.update(_SERVICE, False)
    jax.distributed.initialize(**arguments)


def wait_at_barrier(name: str, timeout_seconds: float) -> None:
    """Waits until all hosts are at the barrier of that name; raises RuntimeError after the timeout."""
    _client().wait_at_barrier(name, int(timeout_seconds * 1000))


def set_once(key: str, value: str) -> None:
    """Sets a key for all hosts; raises RuntimeError where it is set already or the service is gone."""
    _client().key_value_set(key, value)


def try_get(key: str) -> str:
    """Returns the value of a key; raises RuntimeError where it is not set or the service is gone."""
    return _client().key_value_try_get(key)


def _client() -> Any:
    if distributed.global_state.client is None:
        raise RuntimeError("jax.distributed is not initialized")
    return distributed.global_state.client
