"""Devices and meshes: data-parallel `pmap` by default on one host, and `jit` over a mesh on several."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfusion.data.batch import Batch
from mmfusion.distributed import sharding
from mmfusion.distributed.signals import Stop
from mmfusion.errors import UserError

AXIS = sharding.DATA
MODES = ("auto", "pmap", "jit")


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Places batches and states on the devices of all hosts, and compiles steps for them.

    Attributes:
      mode: `pmap`, or `jit` over a mesh.
      mesh: all devices on the axes `data` (divides the batch), `fsdp` (divides the batch and the state) and `model`
        (divides the state); under `pmap` on `data` alone.
    """

    mode: str
    mesh: Mesh

    @property
    def axis_name(self) -> str | None:
        """The axis to sum over inside a step; None where the compiler inserts the sums."""
        return AXIS if self.mode == "pmap" else None

    @property
    def host_index(self) -> int:
        return jax.process_index()

    @property
    def num_hosts(self) -> int:
        return jax.process_count()

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def should_stop(self, stop: Stop, step: int, k: int) -> bool:
        """Returns whether to stop after `step`, the last of a call of `k`; the answer is the same on all hosts."""
        stop.after_step()
        if self.num_hosts == 1:
            return stop.is_set()
        # JAX agrees on the number of one step: each step of a call has to be asked for, whatever the answers before.
        return sum(multihost_utils.reached_preemption_sync_point(step - i) for i in reversed(range(k))) > 0

    def put_batch(self, batch: Batch) -> Batch:
        """Starts the transfer of this host's rows `[B / hosts, ...]` to its devices."""
        local = self.num_devices // self.num_hosts
        if self.mode == "pmap":
            batch = jax.tree.map(lambda x: x.reshape(local, -1, *x.shape[1:]), batch)  # [devices, B / devices, ...]
        return self._put(batch, NamedSharding(self.mesh, self._rows))

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of host values to every device."""
        return self._put(jax.tree.map(np.asarray, tree), NamedSharding(self.mesh, PartitionSpec()))

    def _put(self, tree: Any, target: NamedSharding) -> Any:
        if self.num_hosts == 1:
            return jax.device_put(tree, target)  # all arrays at once, in half the time of one after the other
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(target, x), tree)

    def put_state(self, state: Any) -> Any:
        """Copies a state of host values, complete on every host, to the devices with the state's sharding."""
        host_state = jax.tree.map(np.asarray, state)
        shardings = self.state_sharding(host_state)
        if shardings is None:
            return self.replicate(host_state)

        def put(x: np.ndarray, of: NamedSharding) -> jax.Array:
            return jax.make_array_from_callback(x.shape, of, lambda index: x[index])

        return jax.tree.map(put, host_state, shardings)

    def to_host(self, state: Any) -> Any:
        """Returns a state with complete host arrays, on every host; arrays are gathered one after the other."""

        def gather(x: jax.Array) -> np.ndarray:
            if x.is_fully_addressable or x.is_fully_replicated:
                return np.array(x)  # a copy, because the next step donates the buffer
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))

        return jax.tree.map(gather, state)

    def state_sharding(self, shapes: Any) -> Any:
        """Returns the sharding of each array of a state; None where every device holds the whole state."""
        return None if self.num_devices == self.mesh.shape[AXIS] else sharding.of_state(shapes, self.mesh)

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(AXIS if self.mode == "pmap" else (AXIS, sharding.FSDP))

    def compile_train(self, step: Callable[..., Any], shapes: Any = None, replicas: int = 0) -> Callable[..., Any]:
        """Compiles `step(state, batch, learning_rate)` into `call(state, batches, learning_rates)`.

        A call takes one step per batch: unrolled on CPU, where convolutions inside a scan are slow, and scanned on
        accelerators, where the overhead of a call counts.

        Args:
          step: a train step; its state is donated.
          shapes: of the state, needed where the state is sharded.
          replicas: number R of runs whose steps are one program, with every argument and result a tuple of R; 0 for a
            single run.

        Returns:
          A function of a state, a tuple of K batches and learning rates `[K]`, to a state and metrics `[K]`.
        """
        call = functools.partial(_call, step, unroll=self.platform == "cpu")
        if replicas:
            call = functools.partial(_replicated, call)
        if self.mode == "pmap":
            return jax.pmap(
                call, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=self._pmap_devices()
            )
        replicated, rows = NamedSharding(self.mesh, PartitionSpec()), NamedSharding(self.mesh, self._rows)
        state = self.state_sharding(shapes) or replicated
        return jax.jit(
            call, in_shardings=(state, rows, replicated), out_shardings=(state, replicated), donate_argnums=0
        )

    def compile_eval(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `step(params, batch_stats, batch)`, whose result is the same on every device."""
        if self.mode == "pmap":
            return jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=self._pmap_devices())
        replicated, rows = NamedSharding(self.mesh, PartitionSpec()), NamedSharding(self.mesh, self._rows)
        return jax.jit(step, in_shardings=(None, None, rows), out_shardings=replicated)  # None: the state as it is

    def _pmap_devices(self) -> list[Any] | None:
        # With several hosts `pmap` must choose each host's devices itself: name them only where they are a subset.
        return None if self.num_devices == jax.device_count() else list(self.mesh.devices.flat)


def resolved_mode(mode: str, hosts: int) -> str:
    """Returns `pmap` or `jit` for `config.parallel.mode`, `auto` resolved for a number of hosts."""
    if mode != "auto":
        return mode
    return "pmap" if hosts == 1 else "jit"


def make_partitioner(mode: str, devices: int = 0, axes: tuple[int, int, int] = (-1, 1, 1)) -> Partitioner:
    """Returns a partitioner over the first devices.

    Args:
      mode: `pmap`, `jit`, or `auto`, see `resolved_mode`.
      devices: number of devices; 0 for all of them.
      axes: sizes of the data, fsdp and model axes of the mesh under `jit`; -1 for the remaining devices.
    """
    mode, used = resolved_mode(mode, jax.process_count()), np.array(jax.devices()[: devices or None])
    if mode == "pmap":
        return Partitioner(mode, Mesh(used, (AXIS,)))
    return Partitioner(mode, Mesh(used.reshape(axes), sharding.AXES))


def fit_to_machine(parallel: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Returns the changes of `config.parallel` with which a run trained elsewhere can be read on this machine.

    Nothing changes where this machine has the same devices. Otherwise as many devices are used as the batch divides
    over; the state stays sharded where they allow it.

    Args:
      parallel: the section `config.parallel` of the run.
      batch_size: over all devices.

    Raises:
      UserError: only some devices of several hosts could be used.
    """
    count, hosts = jax.device_count(), jax.process_count()
    fsdp, model = parallel["mesh"]["fsdp"], parallel["mesh"]["model"]
    wanted = parallel["devices"] or count
    available = wanted == count or (wanted < count and hosts == 1)  # several hosts use all of their devices
    divides = wanted % (fsdp * model) == 0 and count // hosts % model == 0 and batch_size % (wanted // model) == 0
    if available and divides:
        return {}
    if count % (fsdp * model) or count // hosts % model or batch_size % fsdp:
        fsdp = model = 1
    sizes = range(fsdp * model, count + 1, fsdp * model)
    devices = max(size for size in sizes if batch_size % (size // model) == 0)
    if hosts > 1 and devices < count:
        raise UserError(
            f"does not divide over the {count} devices of {hosts} hosts: read this run on one of them",
            path="config.batch_size",
            value=batch_size,
        )
    return {"devices": devices, "mesh": {"data": -1, "fsdp": fsdp, "model": model}}


def steps_per_call(requested: int, platform: str, boundaries: Sequence[int]) -> int:
    """Returns the number of steps of one compiled call, which divides all boundaries.

    Args:
      requested: the largest number; 0 for one on CPU and up to eight on accelerators.
      platform: `cpu`, `gpu` or `tpu`.
      boundaries: steps that a call must not cross: resuming, an evaluation, a checkpoint, the end.
    """
    common = math.gcd(*boundaries)
    limit = requested or (1 if platform == "cpu" else 8)
    return max(k for k in range(1, limit + 1) if common % k == 0)


def _call(
    step: Callable[..., Any], state: Any, batches: tuple[Batch, ...], rates: jax.Array, *, unroll: bool
) -> tuple[Any, Any]:
    if not unroll and len(batches) > 1:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        return jax.lax.scan(lambda s, xs: step(s, *xs), state, (stacked, rates))
    collected = []
    for k, batch in enumerate(batches):
        state, metrics = step(state, batch, rates[k])
        collected.append(metrics)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *collected)


def _replicated(call: Callable[..., Any], states: tuple, batches: tuple, rates: tuple) -> tuple:
    """Takes the calls of R runs as one with a leading axis; returns (state, metrics) of each run."""
    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (states, batches, rates))
    results = jax.vmap(call)(*stacked)
    return tuple(jax.tree.map(lambda x, r=r: x[r], results) for r in range(len(states)))
