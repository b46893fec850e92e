"""The coordination service of `jax.distributed`: the only file that uses private parts of another package.

All of them are attributes of `jax._src.distributed.global_state`, which have no public counterpart:

- `num_processes`, `process_id`: known before JAX has devices. `jax.process_count()` and `jax.process_index()` start the
  backend, which waits for all hosts, and so cannot be asked while a host reports an error.
- `client.wait_at_barrier`: a barrier with a timeout that needs no devices. `multihost_utils.sync_global_devices` sums
  over all devices, and Gloo gives up on a host that is 30 seconds late.
- `client.key_value_set`, `client.key_value_try_get`: tell other hosts why one of them failed, whatever they are doing.
"""

from typing import Any

from jax._src import distributed


def num_hosts() -> int:
    """Returns the number of connected hosts, 1 where `jax.distributed` is not initialized."""
    return distributed.global_state.num_processes or 1


def host_index() -> int:
    """Returns the index of this host, 0 on the primary one."""
    return distributed.global_state.process_id


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
