"""A checked config and its dataset -> the model, the tasks and the compiled steps of a run."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset
from mmfusion.data.decoding import empty_batch
from mmfusion.data.preprocess import make_preprocess
from mmfusion.distributed import hosts
from mmfusion.distributed.mesh import Partitioner, make_partitioner
from mmfusion.models.build import build
from mmfusion.objectives import AUXILIARIES, Objectives, Task, make_objectives
from mmfusion.optim import freezing
from mmfusion.training import state, step


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made of; nothing here holds state.

    Attributes:
      model, optimizer: as the config says.
      tasks: one a target.
      preprocess: `(batch, key or None) -> batch`, on the device.
      partitioner: devices and hosts.
      scale: of the updates, see `optim.slowed`.
      freeze: which encoders stay as they are.
      objectives: what there is beside the tasks.
      spike: from where a loss is one, see `step.train_step`.
      example: a host batch of two padding rows, for shapes.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    tasks: dict[str, Task]
    preprocess: state.Preprocess
    partitioner: Partitioner
    scale: Callable[[Any], Any] | None
    freeze: freezing.Freezing
    objectives: Objectives
    spike: float
    example: Batch

    def drawn(self, seed: int) -> state.TrainState:
        """Returns the state before the first step, every parameter drawn, where no device needs to hold all of it."""
        divided = self.partitioner.state_sharding(self.state_shapes())
        init = self._init if divided is None else jax.jit(self._init, out_shardings=divided)
        return init(self.example, seed=np.uint32(seed))

    def drawn_state(self, seed: int) -> state.TrainState:
        """Returns the same on the host."""
        return self.partitioner.to_host(self.drawn(seed))

    def initial_state(self, seed: int) -> state.TrainState:
        """Returns the same on the devices, as the steps take it."""
        return self.partitioner.put_state(self.drawn_state(seed))

    def state_shapes(self) -> Any:
        """Returns the state's shapes and dtypes, without computing it."""
        return jax.eval_shape(self._init, self.example, seed=np.uint32(0))

    @functools.cached_property
    def _init(self) -> Callable[..., state.TrainState]:
        # One function, so that whoever asks for shapes and whoever draws trace it once.
        return jax.jit(functools.partial(
            state.init_state, self.model, self.optimizer, preprocess=self.preprocess,
            balance=self.objectives.balance(self.tasks, self.model.modalities), spike=self.spike,
        ))  # fmt: skip

    def step(self, accumulate: int) -> Callable[..., Any]:
        """Returns the pure `(state, batch, learning_rate) -> (state, metrics)`."""
        return functools.partial(
            step.train_step,
            model=self.model,
            optimizer=self.optimizer,
            tasks=self.tasks,
            preprocess=self.preprocess,
            accumulate=accumulate,
            unroll=self.partitioner.platform == "cpu",
            axis_name=self.partitioner.axis_name,
            scale=self.scale,
            freeze=self.freeze,
            objectives=self.objectives,
            spike=self.spike,
        )

    def train_step(self, accumulate: int) -> Callable[..., Any]:
        """Returns the compiled `(state, batches, learning_rates) -> (state, metrics)`."""
        return self.partitioner.compile_train(self.step(accumulate), self.state_shapes())

    def eval_step(self) -> Callable[..., Any]:
        """Returns the compiled `(params, batch_stats, batch) -> results of every row`."""
        return self.partitioner.compile_eval(
            functools.partial(
                step.eval_step,
                model=self.model,
                tasks=self.tasks,
                preprocess=self.preprocess,
                axis_name=self.partitioner.axis_name,
                heads=self.objectives.blending is not None,
            )
        )


def assemble(config: ConfigDict, dataset: Dataset) -> Parts:
    """Builds the parts of a run; no parameter is made yet."""
    mesh = config.parallel.mesh
    partitioner = make_partitioner(config.parallel.mode, config.parallel.devices, (mesh.data, mesh.fsdp, mesh.model))
    hosts.connect(partitioner.mesh)
    freeze = freezing.make(config.model.encoders, config.steps)
    return Parts(
        model=build(
            config.model,
            dataset.encoder_kwargs(),
            dataset.reader.outputs,
            axis_name=partitioner.axis_name,
            dtype=_dtype(config.model.dtype, partitioner.platform),
            objectives=config.objectives,
            auxiliaries=AUXILIARIES,
            frozen=[m for m in config.model.encoders if f"encoders_{m}" in freeze.always],
        ),
        optimizer=optim.make(config.optim),
        tasks=make_tasks(config.data.targets, dataset.reader.outputs),
        preprocess=make_preprocess(
            config.data.modalities.to_dict(),
            {other: m for m, options in config.model.encoders.items() for other in options.join},
        ),
        partitioner=partitioner,
        scale=optim.slowed(config.model.encoders),
        freeze=freeze,
        objectives=make_objectives(config.objectives),
        spike=config.recovery.spike_threshold,
        example=empty_batch(dataset.reader, 2),
    )


def make_tasks(targets: ConfigDict, outputs: dict[str, int]) -> dict[str, Task]:
    """Returns a Task for each target of a config."""
    return {
        name: Task(
            kind=options.kind,
            outputs=outputs[name],
            loss=options.loss,
            gamma=options.get("gamma", 2.0),
            label_smoothing=options.get("label_smoothing", 0.0),
            class_weights=tuple(options.get("class_weights", ())),
            weight=options.weight,
        )
        for name, options in targets.items()
    }


def _dtype(name: str, platform: str) -> Any:
    """bf16 on accelerators only: on CPU its matrix products are slower than float32's."""
    if name == "auto":
        return jnp.float32 if platform == "cpu" else jnp.bfloat16
    return jnp.dtype(name)
