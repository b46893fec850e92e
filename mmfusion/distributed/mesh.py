"""Devices and meshes: the only file that knows them. `pmap` by default, `jit` over a mesh one config line away."""

import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmfusion.data.batch import Batch
from mmfusion.distributed import sharding
from mmfusion.errors import UserError

AXIS = sharding.DATA
MODES = ("pmap", "jit")
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """How a run is spread: the batch over the devices of all hosts, and the state copied to each or divided.

    Attributes:
      mode: `pmap`, or `jit` over a mesh.
      mesh: all devices on the axes `data`, `fsdp` (which divides the batch, too, and the state) and `model` (which
        divides the state); under `pmap` on the first alone.
    """

    mode: str
    mesh: Mesh

    @property
    def axis_name(self) -> str | None:
        """The name to sum over inside a step; None where the compiler sums."""
        return AXIS if self.mode == "pmap" else None

    @property
    def host(self) -> int:
        return jax.process_index()

    @property
    def hosts(self) -> int:
        return jax.process_count()

    @property
    def devices(self) -> int:
        return self.mesh.size

    @property
    def platform(self) -> str:
        return self.mesh.devices.flat[0].platform

    def should_stop(self, stop: threading.Event, step: int, k: int) -> bool:
        """Returns whether to stop after `step`, the last of a call of `k`; several hosts say so at one, soon after one
        of them is told."""
        if self.hosts == 1:
            return stop.is_set()
        # JAX waits for the number of one step: each of a call must be asked for, whatever the others say.
        return sum(multihost_utils.reached_preemption_sync_point(step - i) for i in reversed(range(k))) > 0

    def put_batch(self, batch: Batch) -> Batch:
        """Starts the transfer of this host's rows `[B / hosts, ...]` to its devices."""
        rows_of = NamedSharding(self.mesh, self._rows)
        local = self.devices // self.hosts

        def put(x: np.ndarray) -> jax.Array:
            rows = x.reshape(local, -1, *x.shape[1:]) if self.mode == "pmap" else x  # pmap: [devices, B / devices, ...]
            return jax.make_array_from_process_local_data(rows_of, rows)

        return jax.tree.map(put, batch)

    def replicate(self, tree: Any) -> Any:
        """Copies a tree of host values to every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), tree)

    def put_state(self, state: Any) -> Any:
        """Copies a state of host values, which every host has whole, to the devices, divided as the mesh says."""
        host = jax.tree.map(np.asarray, state)
        if (divided := self.state_sharding(host)) is None:
            return self.replicate(host)
        place = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda part: x[part])  # noqa: E731
        return jax.tree.map(place, host, divided)

    def to_host(self, state: Any) -> Any:
        """Returns a state's arrays whole, on every host, one after the other."""

        def whole(x: jax.Array) -> np.ndarray:
            if x.is_fully_addressable or x.is_fully_replicated:
                return np.array(x)  # a copy, because the next step donates what it was
            return multihost_utils.process_allgather(x, tiled=True)

        return jax.tree.map(whole, state)

    def state_sharding(self, shapes: Any) -> Any:
        """Returns which part of each array of a state a device has; None where each device has all."""
        return None if self.devices == self.mesh.shape[AXIS] else sharding.of_state(shapes, self.mesh)

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(AXIS if self.mode == "pmap" else (AXIS, sharding.FSDP))

    def compile_train(self, step: Callable[..., Any], shapes: Any = None, replicas: int = 0) -> Callable[..., Any]:
        """Compiles `step(state, batch, learning_rate)` into `call(state, batches, learning_rates)`.

        A call takes as many steps as it has batches: written out on CPU, where convolutions inside a scan are slow, and
        scanned on accelerators, where a call's overhead counts.

        Args:
          step: a train step; it donates its state.
          shapes: of the state, for where it is divided.
          replicas: R runs take their steps in one program, and each argument and result is a tuple of R; 0: one run
            by itself.

        Returns:
          A function of a state, a tuple of batches and learning rates `[K]`, to a state and metrics `[K]`.
        """
        call = functools.partial(_call, step, unroll=self.platform == "cpu")
        if replicas:
            call = functools.partial(_replicated, call)
        if self.mode == "pmap":
            return jax.pmap(
                call, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0, devices=self._pmap_devices()
            )
        whole, rows = (NamedSharding(self.mesh, spec) for spec in (PartitionSpec(), self._rows))
        state = self.state_sharding(shapes) or whole
        return jax.jit(call, in_shardings=(state, rows, whole), out_shardings=(state, whole), donate_argnums=0)

    def compile_eval(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `step(params, batch_stats, batch)`, whose result is the same on every device."""
        if self.mode == "pmap":
            return jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=self._pmap_devices())
        whole, rows = (NamedSharding(self.mesh, spec) for spec in (PartitionSpec(), self._rows))
        return jax.jit(step, in_shardings=(None, None, rows), out_shardings=whole)  # None: the state as it is divided

    def _pmap_devices(self) -> list[Any] | None:
        # Named only when they are not all: with several hosts `pmap` must be left to take each host's own.
        return None if self.devices == jax.device_count() else list(self.mesh.devices.flat)


def make_partitioner(mode: str, devices: int = 0, axes: tuple[int, int, int] = (-1, 1, 1)) -> Partitioner:
    """Returns the parallelism over the first `devices` devices; 0 means all of them.

    Args:
      mode: `pmap` or `jit`.
      devices: how many.
      axes: sizes of the mesh's data, fsdp and model axes, under `jit`; -1: what the others leave.
    """
    every = np.array(jax.devices()[: devices or None])
    if mode == "pmap":
        return Partitioner(mode, Mesh(every, (AXIS,)))
    return Partitioner(mode, Mesh(every.reshape(axes), sharding.AXES))


def fit_to_machine(asked: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Returns how a run that was spread elsewhere is spread here to be read: what of `config.parallel` must change.

    As it was, where this machine has such devices, else over as many as the batch divides over; the state stays divided
    where they allow it.

    Raises:
      UserError: of several hosts' devices it could take only some.
    """
    count = jax.device_count()
    fsdp, model = asked["mesh"]["fsdp"], asked["mesh"]["model"]
    hosts, wanted = jax.process_count(), asked["devices"] or count
    there = wanted == count or (wanted < count and hosts == 1)  # several hosts use all of their devices
    if there and wanted % (fsdp * model) == 0 and count // hosts % model == 0 and batch_size % (wanted // model) == 0:
        return {}
    if count % (fsdp * model) or count // hosts % model or batch_size % fsdp:
        fsdp = model = 1
    sizes = range(fsdp * model, count + 1, fsdp * model)
    devices = max(size for size in sizes if batch_size % (size // model) == 0)
    if hosts > 1 and devices < count:
        raise UserError(
            f"config.batch_size={batch_size} does not divide over the {count} devices of {hosts} hosts: "
            "read this run on one of them"
        )
    return {"devices": devices, "mesh": {"data": -1, "fsdp": fsdp, "model": model}}


def steps_per_call(asked: int, platform: str, boundaries: Sequence[int]) -> int:
    """Returns how many steps one call takes: as asked, or (0) one on CPU and up to eight on an accelerator.

    A call never reaches over a boundary (where the run goes on, an evaluation, a checkpoint, the end): the number
    divides them all.
    """
    common = math.gcd(*boundaries)
    limit = asked or (1 if platform == "cpu" else 8)
    return max(k for k in range(1, limit + 1) if common % k == 0)


def _call(
    step: Callable[..., Any], state: Any, batches: tuple[Batch, ...], rates: jax.Array, *, unroll: bool
) -> tuple[Any, Any]:
    if not unroll and len(batches) > 1:
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
        return jax.lax.scan(lambda s, xs: step(s, *xs), state, (stacked, rates))
    every = []
    for k, batch in enumerate(batches):
        state, metrics = step(state, batch, rates[k])
        every.append(metrics)
    return state, jax.tree.map(lambda *x: jnp.stack(x), *every)


def _replicated(call: Callable[..., Any], states: tuple, batches: tuple, rates: tuple) -> tuple:
    """Takes the calls of R runs as one with a leading axis; returns a (state, metrics) for each."""
    stacked = (jax.tree.map(lambda *x: jnp.stack(x), *each) for each in (states, batches, rates))
    together = jax.vmap(call)(*stacked)
    return tuple(jax.tree.map(lambda x, r=r: x[r], together) for r in range(len(states)))


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets, so that the step under way ends and is saved."""
    stop = threading.Event()
    # Of several hosts JAX listens, and tells all of them, see `Partitioner.should_stop`.
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield stop
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def set_deterministic_flags() -> None:
    """Tells XLA to take only GPU kernels that add in a fixed order; to be called before JAX looks for devices."""
    if DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()


def check_determinism(platform: str) -> None:
    """Raises UserError on a GPU whose kernels may add in any order; those of other devices do not."""
    if platform == "gpu" and DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
        raise UserError(
            f"config.deterministic=True needs XLA_FLAGS={DETERMINISTIC} before JAX starts, as train sets it"
        )


def keep_freed_memory() -> None:
    """Lets glibc keep what a step frees; to be called before JAX starts its threads.

    XLA's CPU client allocates its temporaries anew each step. Given back to the kernel in between, they cost the
    easy-VQA step 46,000 page faults and a third of its processor time. One arena, because the others stop at 64 MiB.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-8, 1), (-3, 2**31 - 1), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(option, value)
