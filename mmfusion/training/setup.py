"""A checked config and its dataset -> the model, the tasks and the compiled steps of a run."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion import optim
from mmfusion.config.fields import RunConfig, TargetConfig
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset
from mmfusion.data.decoding import empty_batch
from mmfusion.data.preprocess import make_preprocess
from mmfusion.data.targets import UNSCALED, Scale
from mmfusion.distributed import hosts
from mmfusion.distributed.mesh import Partitioner, make_partitioner
from mmfusion.models.build import build
from mmfusion.models.model import FusionModel
from mmfusion.models.summary import Row, summarize
from mmfusion.objectives import Task, build_objectives, make_objectives
from mmfusion.objectives.auxiliary import Auxiliary
from mmfusion.optim import freezing
from mmfusion.tracking import provenance
from mmfusion.training.eval_step import eval_step
from mmfusion.training.state import Preprocess, TrainState, init_state
from mmfusion.training.step import StepSpec, train_step

MAX_SHARED = 32  # about as many as an ablation has methods


@dataclasses.dataclass(frozen=True)
class TrainSetup:
    """What a run is made of; nothing here holds state.

    Attributes:
      model: encoders, fusion and heads.
      preprocess: `(batch, key or None) -> batch` of raw rows.
      spec: what the train step is made of: the model, optimizer, objectives and so on. Where features of frozen
        encoders are computed before, its model and its preprocessing read these; all else reads raw rows.
      tasks: one for each target.
      partitioner: devices and hosts.
      example: a host batch of two padding rows, for shapes.
    """

    model: FusionModel
    preprocess: Preprocess
    spec: StepSpec
    tasks: dict[str, Task]
    partitioner: Partitioner
    example: Batch

    def init_sharded(self, seed: int) -> TrainState:
        """Returns the state before the first step, sharded from the start where no device can hold all of it."""
        sharding = self.partitioner.state_sharding(self.state_shapes())
        init = self._init if sharding is None else self._jit(self._init.__wrapped__, out_shardings=sharding)
        return init(self.example, seed=np.uint32(seed))

    def init_on_host(self, seed: int) -> TrainState:
        """Returns the state before the first step as host arrays."""
        return self.partitioner.to_host(self.init_sharded(seed))

    def init_state(self, seed: int) -> TrainState:
        """Returns the state before the first step on the devices, as the step takes it."""
        return self.partitioner.put_state(self.init_on_host(seed))

    def state_shapes(self) -> Any:
        """Returns the shapes and dtypes of the state, without computing it."""
        return jax.eval_shape(self._init, self.example, seed=np.uint32(0))

    @functools.cached_property
    def summary(self) -> list[Row]:
        """The encoders, the fusion and the heads, with their parameters and FLOPs."""
        state, batch = self.state_shapes(), jax.eval_shape(lambda batch: self.preprocess(batch, None), self.example)
        return summarize(self.model, {"params": state.params, "batch_stats": state.batch_stats}, batch)

    @functools.cached_property
    def _init(self) -> Any:
        # One function, so that shapes and values are traced once.
        return self._jit(functools.partial(
            init_state, self.model, self.spec.optimizer, preprocess=self.preprocess,
            objectives=self.spec.objectives, spike_threshold=self.spec.spike_threshold,
        ))  # fmt: skip

    def _jit(self, function: Callable[..., TrainState], **options: Any) -> Any:
        # It runs once: on CPU a low level compiles in a half to a third of the time, to the same bits.
        level = {"xla_backend_optimization_level": 1} if self.partitioner.platform == "cpu" else None
        return jax.jit(function, compiler_options=level, **options)

    @property
    def step(self) -> Callable[..., Any]:
        """The pure `(state, batch, learning_rate) -> (state, metrics)`."""
        return functools.partial(train_step, spec=self.spec)

    def compile_train_step(self) -> Callable[..., Any]:
        """Returns the compiled `(state, batches, learning_rates) -> (state, metrics)`."""
        return self._train_step

    def compile_eval_step(self) -> Callable[..., Any]:
        """Returns the compiled `(params, batch_stats, batch) -> results of every row`."""
        return self._eval_step

    @functools.cached_property
    def _train_step(self) -> Callable[..., Any]:
        return self.partitioner.compile_train(self.step, self.state_shapes())

    @functools.cached_property
    def _eval_step(self) -> Callable[..., Any]:
        return self.partitioner.compile_eval(functools.partial(
            eval_step, model=cast(FusionModel, self.spec.model), tasks=self.tasks, preprocess=self.spec.preprocess,
            axis_name=self.partitioner.axis_name, heads=self.spec.objectives.need_head_losses,
        ))  # fmt: skip

    def reading(self, layers: Mapping[str, nn.Module], preprocess: Preprocess) -> "TrainSetup":
        """Returns the setup whose steps read features of the modalities whose encoders `layers` take the place of."""
        if layers not in self._reading:
            model = self.model.clone(encoders=flax.core.FrozenDict({**self.model.encoders, **layers}))
            spec = dataclasses.replace(self.spec, model=model, preprocess=preprocess)
            self._reading[layers] = dataclasses.replace(self, spec=spec)
        return self._reading[layers]

    @functools.cached_property
    def _reading(self) -> dict[Any, "TrainSetup"]:
        return {}


Setups = collections.OrderedDict[tuple[str, str], TrainSetup]
_shared: Setups | None = None


@contextlib.contextmanager
def shared_setups(setups: Setups | None = None) -> Iterator[None]:
    """Lets runs of one model in this process, such as trials of an ablation, share what is traced and compiled.

    They may differ in the seed, the learning rate, and how often they validate and save.

    Args:
      setups: what runs have shared before, which is added to; None: nothing.
    """
    global _shared  # the runs are started by functions that know nothing of each other
    before, _shared = _shared, collections.OrderedDict() if setups is None else setups
    try:
        yield
    finally:
        _shared = before


def forget_setups() -> None:
    """Forgets the setups of `shared_setups`, with their programs."""
    if _shared is not None:
        _shared.clear()


def build_setup(config: ConfigDict | RunConfig, dataset: Dataset) -> TrainSetup:
    """Returns what a run is made of; no parameter is initialised yet."""
    run = config if isinstance(config, RunConfig) else configs.read(config)
    if _shared is None or hosts.is_multihost():
        return _build(run, dataset)
    recovery = dataclasses.replace(run.recovery, max_consecutive_bad_steps=0, rollbacks=0, lr_factor=1.0)
    optimizer = dataclasses.replace(run.optim, learning_rate=1.0)  # each step is given its own
    loop = {"seed": 0, "eval_every": 1, "checkpoint_every": 1, "recovery": recovery, "optim": optimizer}
    key = repr(dataclasses.replace(run, **loop)), repr(dataset.saved())
    if key not in _shared:
        _shared[key] = _build(run, dataset)
        if len(_shared) > MAX_SHARED:
            _shared.popitem(last=False)
    _shared.move_to_end(key)
    return _shared[key]


def _build(run: RunConfig, dataset: Dataset) -> TrainSetup:
    mesh = run.parallel.mesh
    partitioner = make_partitioner(run.parallel.mode, run.parallel.devices, (mesh.data, mesh.fsdp, mesh.model))
    hosts.connect(partitioner.mesh)
    if hosts.is_multihost():
        hosts.check_agreement({**provenance.identity(), **dataset.identity()})
    dtype = _dtype(run.model.dtype, partitioner.platform)
    frozen = freezing.make(run.model.encoders, run.steps)
    tasks = make_tasks(run.data.targets, dataset.reader.outputs, dataset.reader.scales, dataset.class_weights)
    encoders = {m: section.to_dict() for m, section in run.model.encoders.items()}
    kwargs = {
        "width": run.model.width, "dtype": dtype, "axis_name": partitioner.axis_name,
        "modalities": tuple(sorted(encoders)),
    }  # fmt: skip
    by_name = make_objectives(run.objectives, kwargs)
    heads = {objective.unimodal_heads for objective in by_name.values()}
    model = build(
        {"width": run.model.width, "encoders": encoders, "fusion": run.model.fusion.to_dict()},
        dataset.encoder_kwargs(),
        dataset.reader.outputs,
        axis_name=partitioner.axis_name,
        dtype=dtype,
        frozen=[m for m in encoders if f"encoders_{m}" in frozen.always],
        auxiliaries={name: objective for name, objective in by_name.items() if isinstance(objective, Auxiliary)},
        unimodal="heads" if "heads" in heads else "probes" if "probes" in heads else "",
        scalars=tuple(name for objective in by_name.values() for name in objective.parameters(list(tasks))),
    )
    objectives = build_objectives(model, tasks, by_name)
    preprocess = preprocessing(run)
    spec = StepSpec(
        model=model,
        optimizer=make_optimizer(run, frozen),
        objectives=objectives,
        preprocess=preprocess,
        freezing=frozen,
        spike_threshold=run.recovery.spike_threshold,
        micro_batches=run.optim.accumulate,
        unroll=partitioner.platform == "cpu",
        axis_name=partitioner.axis_name,
    )
    return TrainSetup(model, preprocess, spec, tasks, partitioner, empty_batch(dataset.reader, 2))


def preprocessing(run: RunConfig, computed: Collection[str] = ()) -> Preprocess:
    """Returns what augments and normalises a batch; the inputs of `computed` modalities are features."""
    joined = {other: m for m, section in run.model.encoders.items() for other in section.join}
    return make_preprocess({m: section.to_dict() for m, section in run.data.modalities.items()}, joined, computed)


def make_optimizer(run: RunConfig, frozen: freezing.Freezing) -> optax.GradientTransformationExtraArgs:
    """Returns the chain from gradients to updates: clipping, the optimizer, layer-wise decay, zero where frozen."""
    chain = [optim.make(run.optim.to_dict(), frozen)]
    if any(section.layer_decay != 1 for section in run.model.encoders.values()):
        chain.append(optax.with_extra_args_support(optim.layerwise_lr_decay(run.model.encoders)))
    if frozen:
        chain.append(frozen.zero_updates())
    optimizer = chain[0] if len(chain) == 1 else optax.chain(*chain)
    if not frozen.always:
        return optimizer
    # What never learns has no moments and takes no time; its gradient may not be zero, as objectives change gradients.
    never = functools.partial(frozen.learns, never=True)
    return optax.chain(optax.masked(optimizer, frozen.learns), optax.masked(optax.set_to_zero(), never))


def make_tasks(
    targets: Mapping[str, TargetConfig],
    outputs: Mapping[str, int],
    scales: Mapping[str, Scale] = MappingProxyType({}),
    class_weights: Mapping[str, tuple[float, ...]] = MappingProxyType({}),
) -> dict[str, Task]:
    """Returns a Task for each target of a config; `class_weights` are those that depend on the data."""
    fields = {field.name for field in dataclasses.fields(Task)} - {"kind", "outputs", "scale"}
    tasks = {}
    for name, target in targets.items():
        options: dict[str, Any] = {key: x for key, x in target.options.items() if key in fields}
        if name in class_weights:
            options["class_weights"] = class_weights[name]
        tasks[name] = Task(target.kind, outputs[name], **options, scale=scales.get(name, UNSCALED))
    return tasks


def _dtype(name: str, platform: str) -> Any:
    """bf16 on accelerators only: on CPU its matrix products are slower than float32's."""
    if name == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
