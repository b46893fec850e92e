"""One update of a run, taken again from the checkpoint before it, with what a step does not say of itself."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.config import RunConfig
from mmfusion.data import dataset as datasets
from mmfusion.data import pipeline, trust
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset
from mmfusion.errors import UserError
from mmfusion.training import frozen_features, recovery, warm_start
from mmfusion.training.progress import Progress
from mmfusion.training.restore import fitted_config, open_checkpoints, read_config
from mmfusion.training.setup import TrainSetup, build_setup


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What one update did.

    Attributes:
      step: its number, counted from 1; `since`: the step of the checkpoint that it was reached from.
      numbers: of the step: loss, grad_norm, skipped and so on, and its learning_rate.
      recorded: those that `wrong.json` holds of it, if it does.
      gradients: parameter -> the largest absolute value of its gradient, NaN where one is not finite.
      losses: example id -> its loss before the update, as in evaluation.
      inputs: modality -> ids of the examples with values that are not finite.
    """

    step: int
    since: int
    numbers: dict[str, float]
    recorded: dict[str, Any]
    gradients: dict[str, float]
    losses: dict[int, float]
    inputs: dict[str, list[int]]


def replay(workdir: str | Path, step: int = 0) -> Replayed:
    """Takes an update of a run again; changes nothing there.

    Args:
      workdir: of the run.
      step: the update's number, counted from 1; 0: the first of those in its `wrong.json`.

    Raises:
      UserError: no such run or update, other data, or no checkpoint is left from before it.
    """
    config, folder = read_config(workdir), epath.Path(workdir)
    trust.check_places(configs.to_json(config))
    wrong = _recorded(folder)
    step = step or wrong["first"]
    if not 0 < step <= configs.read(config).steps:
        raise UserError(
            f"updates of {workdir} are 1 to {configs.read(config).steps}; it has no {recovery.FILE}",
            path="--step",
            value=step,
        )
    recorded = next((update for update in wrong["updates"] if update["step"] == step), {})
    checkpoints = open_checkpoints(workdir, config)
    run = fitted_config(config)
    dataset = datasets.load(run.data, seed=run.seed)
    setup = build_setup(run, dataset)
    state, progress = _before(checkpoints, str(workdir), step, run, dataset, setup)
    progress.rollbacks = wrong["rollbacks"] if recorded else progress.rollbacks
    reading = frozen_features.cached(run, dataset, setup, state)
    dataset, setup = reading.dataset, reading.setup

    partitioner, since, gradients = setup.partitioner, progress.step, {}
    batches = pipeline.train_batches(
        dataset.splits["train"], seed=run.seed, batch_size=run.batch_size, first=since, last=step,
        host=partitioner.host_index, hosts=partitioner.num_hosts, workers=run.data.workers,
    )  # fmt: skip
    recording = dataclasses.replace(setup.spec, optimizer=record_gradients(setup.spec.optimizer, gradients))
    train_step, recording_step = (
        setup.compile_train_step(),
        dataclasses.replace(setup, spec=recording).compile_train_step(),
    )
    losses, inputs = {}, {}
    for rows, batch in pipeline.to_device(batches, partitioner.put_batch):
        rates, last = progress.learning_rates(run, 1), progress.step + 1 == step
        if last:
            losses, inputs = _losses(setup, state, batch), _not_finite(rows)
        state, numbers = (recording_step if last else train_step)(state, (batch,), partitioner.replicate(rates))
        progress.step += 1
    numbers = {name: float(column[0]) for name, column in jax.device_get(numbers).items()}
    jax.effects_barrier()
    numbers["learning_rate"] = float(rates[0])
    return Replayed(step, since, numbers, recorded, gradients, losses, inputs)


def _recorded(workdir: epath.Path) -> dict[str, Any]:
    path = workdir / recovery.FILE
    return configs.read_json(path) if path.exists() else {"first": 0, "rollbacks": 0, "updates": []}


def _before(
    checkpoints: Checkpoints, workdir: str, step: int, config: RunConfig, dataset: Dataset, setup: TrainSetup
) -> tuple[Any, Progress]:
    """Returns the newest state, on the devices, from which training leads to the update without a validation."""
    saved = max((kept for kept in checkpoints.steps() if kept < step), default=None)
    since = saved or 0
    # schedules and balances may change at a validation, and after each there was a checkpoint
    if (step - 1) // config.eval_every > since // config.eval_every:
        have = ", ".join(map(str, checkpoints.steps())) or "none"
        message = f"the checkpoint before it is gone; {workdir} has those of steps {have}"
        raise UserError(message, path="--step", value=step)
    if saved is None:
        drawn, _ = warm_start.begin(config.model.encoders, setup.model, setup.init_on_host(config.seed), dataset.fitted)
        return setup.partitioner.put_state(drawn), Progress()
    host_state, meta = checkpoints.restore(saved, setup.state_shapes())
    dataset.check_unchanged(meta["data"], workdir)
    return setup.partitioner.put_state(host_state), Progress(**meta["progress"])


def record_gradients(
    optimizer: optax.GradientTransformation, gradients: dict[str, float]
) -> optax.GradientTransformation:
    """Returns the optimizer, which fills the dictionary with each parameter's largest gradient as it is computed."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        largest = {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.abs(x).max() for path, x in leaves}
        largest = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, jnp.nan), largest)
        jax.debug.callback(lambda every: gradients.update({name: float(x) for name, x in every.items()}), largest)
        return optimizer.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _losses(setup: TrainSetup, state: Any, batch: Batch) -> dict[int, float]:
    rows = jax.device_get(setup.compile_eval_step()(state.params, state.batch_stats, batch))
    labelled = {task: weight > 0 for task, weight in rows["metric_weight"].items()}
    total = np.sum([spec.weight * labelled[t] * rows["loss"][t] for t, spec in setup.tasks.items()], axis=0)
    return {int(i): float(x) for i, x, weight in zip(rows["id"], total, rows["weight"], strict=True) if weight > 0}


def _not_finite(rows: Batch) -> dict[str, list[int]]:
    found = {}
    for name, leaves in rows.inputs.items():
        for x in jax.tree.leaves(leaves):
            if np.issubdtype(x.dtype, np.floating):
                wrong = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
                found.setdefault(name, []).extend(rows.id[wrong].tolist())
    return {name: ids for name, ids in found.items() if ids}
