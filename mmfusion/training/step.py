"""The train and evaluation steps: pure functions of (state, batch), the same under `pmap` and under `jit`.

Every loss is a sum over examples and a sum of weights. The weights are summed first, over micro-batches, devices and
hosts, so that each example's gradient is divided by the whole batch's weight once, wherever the example sits.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmfusion import optim, rng
from mmfusion.data.batch import Batch, digest
from mmfusion.data.preprocess import lose_modalities
from mmfusion.objectives import NO_OBJECTIVES, Objectives, Task, task_loss, task_weight
from mmfusion.objectives.auxiliary import counts
from mmfusion.optim import skip_step
from mmfusion.optim.freezing import NOTHING, Freezing
from mmfusion.training.state import Preprocess, TrainState

Metrics = dict[str, jax.Array]


UNCERTAIN = {"regression": 0.5}  # what else a task's loss over its variance is multiplied by; 1 where not named


def train_step(
    state: TrainState,
    batch: Batch,
    learning_rate: jax.Array,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    tasks: Mapping[str, Task],
    preprocess: Preprocess,
    accumulate: int,
    unroll: bool,
    axis_name: str | None,
    scale: Callable[[Any], Any] | None = None,
    freeze: Freezing = NOTHING,
    objectives: Objectives = NO_OBJECTIVES,
    spike: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """Takes one step.

    Args:
      state: the state before it.
      batch: this device's rows under `pmap`, all rows under `jit`.
      learning_rate: scalar float32.
      model, optimizer, tasks, preprocess: what the run is made of.
      accumulate: micro-batches that the rows are split into.
      unroll: write the micro-batches out (fast on CPU, where convolutions inside a scan are slow) or scan them.
      axis_name: of the devices under `pmap`; None under `jit`, where the compiler sums.
      scale: `updates -> updates`, what encoders that are slowed down make of theirs; None: as they are.
      freeze: which encoders stay as they are, and their statistics, too.
      objectives: what there is beside the tasks.
      spike: robust standard deviations above the newest losses, from which a loss is a spike; 0: none is.

    Returns:
      The state after it, and scalars: `loss`, `grad_norm`, `weight` (examples counted), `ids` (a checksum of which
      examples), `skipped` (1 where the loss or the gradient was not finite) and `spike` (1 where the loss was one), in
      both of which cases the state was left as it was, `accuracy` of classification tasks,
      `objective/NAME`, the mean loss of each auxiliary objective and of the modalities' own heads (`unimodal`),
      `task/NAME`, each task's where there are several losses, and `weight/NAME` of each head or task that has one.
    """
    if objectives.modality_dropout:
        key = rng.key(state.seed, "modality_dropout", state.step)
        batch = lose_modalities(batch, objectives.modality_dropout, key)
    total = _total(axis_name)
    weights = {task: total(jnp.sum(_weight(batch, task, spec))) for task, spec in tasks.items()}
    counted = {name: total(jnp.sum(_counted(batch, model, name))) for name in objectives.auxiliary}
    scored = _first_classified(tasks) if objectives.ogm_ge else None
    present = {m: total(jnp.sum(batch.weight * there)) for m, there in _presence(batch, model, scored).items()}
    heads = state.balance.get("heads") or {"joint": 1.0, **dict.fromkeys(model.modalities, objectives.unimodal)}
    task_weights = state.balance.get("tasks", {})
    several = len(tasks) > 1 or objectives.auxiliary or model.own_losses
    dropout = rng.key(state.seed, "dropout", state.step)
    augment = rng.key(state.seed, "augment", state.step)

    def loss_of(params: Any, batch_stats: Any, rows: Batch) -> tuple[jax.Array, tuple[Any, Metrics]]:
        inputs, variables = preprocess(rows, augment), {"id": rows.id}
        if objectives.mixing:
            mix = objectives.mixing.draw(rows, rng.key(state.seed, "mixing", state.step))
            if objectives.mixing.where == "input":
                inputs, mix = objectives.mixing.inputs(inputs, mix)
            else:
                variables["mix"] = mix
        outputs, updated = model.apply(
            {"params": freeze.stopped(params), "batch_stats": batch_stats, "rows": variables},
            inputs,
            train=True,
            rngs={"dropout": dropout},
            mutable=["batch_stats"],
        )
        # a batch without weight has loss 0, not NaN
        shares = {task: _weight(rows, task, spec) / jnp.maximum(weights[task], 1e-9) for task, spec in tasks.items()}
        loss, more = jnp.zeros(()), {}

        def answered(values: Callable[[jax.Array], jax.Array], task: str, weight: jax.Array) -> jax.Array:
            """Returns the sum over rows of weight · value, `values(targets)`; a mixed row answers for both."""
            if not objectives.mixing:
                return jnp.sum(weight * values(rows.targets[task]))
            theirs = values(rows.targets[task][mix.partner])
            mine = mix.share * weight * values(rows.targets[task])
            return jnp.sum(mine + (1 - mix.share) * weight[mix.partner] * theirs)

        def head_loss(logits: jax.Array, task: str, there: Any = True) -> jax.Array:
            """Returns a head's mean loss, over the rows that are `there`."""

            def each(targets: jax.Array) -> jax.Array:
                return jnp.where(there, task_loss(logits, targets, tasks[task]), 0.0)

            return answered(each, task, shares[task])

        for task, spec in tasks.items():
            joint = head_loss(outputs.logits[task], task)
            own, watched = heads["joint"] * joint, 0.0
            if objectives.gradnorm:
                slope = jax.grad(head_loss)(outputs.logits[task], task) @ params[f"heads_{task}"]["kernel"].T  # [B, D]
                more[f"slope/{task}"] = jnp.sum(jnp.square(heads["joint"] * slope))
            if model.own_losses:
                alone = {m: head_loss(x, task, outputs.present[m]) for m, x in outputs.unimodal[task].items()}
                more["objective/unimodal"] = more.get("objective/unimodal", 0.0) + spec.weight * sum(alone.values())
                each = sum(heads[m] * value for m, value in alone.items())
                own, watched = (own, each) if model.probed else (own + each, 0.0)
            if several:
                more[f"task/{task}"] = joint
            if outputs.log_variance:
                own = by_uncertainty(own, outputs.log_variance[task], jnp.sum(shares[task]), spec)
            loss += spec.weight * task_weights.get(task, 1.0) * (own + watched)
        more |= {
            f"objective/{name}": jnp.sum(_counted(rows, model, name) * outputs.auxiliary[name])
            / jnp.maximum(counted[name], 1e-9)
            for name in objectives.auxiliary
        }
        loss += sum(weight * more[f"objective/{name}"] for name, weight in objectives.auxiliary.items())
        for m, there in _presence(rows, model, scored).items():
            right = answered(functools.partial(_probability, outputs.unimodal[scored][m]), scored, rows.weight * there)
            more[f"score/{m}"] = right / jnp.maximum(present[m], 1e-9)
        for name, task in _classified(tasks).items():
            more[name] = answered(functools.partial(jnp.equal, outputs.logits[task].argmax(-1)), task, rows.weight)
        return loss, (updated.get("batch_stats", {}), {"loss": loss, **more})

    def accumulated(carry: tuple[Any, Any, Metrics], rows: Batch) -> tuple[tuple[Any, Any, Metrics], None]:
        batch_stats, grads, sums = carry
        (_, (batch_stats, more)), more_grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, batch_stats, rows
        )
        return (batch_stats, jax.tree.map(jnp.add, grads, more_grads), jax.tree.map(jnp.add, sums, more)), None

    if accumulate == 1:
        (_, (batch_stats, sums)), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state.batch_stats, batch
        )
    else:
        names = [*(f"objective/{name}" for name in objectives.auxiliary), *(f"score/{m}" for m in present)]
        names += [f"task/{task}" for task in tasks if several] + [f"slope/{task}" for task in task_weights]
        names += ["objective/unimodal"] * model.own_losses
        zeros = {name: jnp.zeros(()) for name in ("loss", *names, *_classified(tasks))}
        carry = (state.batch_stats, jax.tree.map(jnp.zeros_like, state.params), zeros)
        # Every K-th row (or pair that is mixed) together, so that under `jit` each micro-batch stays spread over all
        # devices.
        some = 2 if objectives.mixing else 1
        micro = jax.tree.map(
            lambda x: (
                x.reshape(-1, accumulate, some, *x.shape[1:]).swapaxes(0, 1).reshape(accumulate, -1, *x.shape[1:])
            ),
            batch,
        )  # [K, B/K, ...]
        if unroll:
            for k in range(accumulate):
                carry, _ = accumulated(carry, jax.tree.map(lambda x, k=k: x[k], micro))
        else:
            carry, _ = jax.lax.scan(accumulated, carry, micro)
        batch_stats, grads, sums = carry

    grads, sums = total(grads), total(sums)
    if objectives.ogm_ge:
        key = rng.key(state.seed, "ogm_ge", state.step)
        grads = objectives.ogm_ge(grads, {m: sums[f"score/{m}"] for m in present}, key, state.step)
    balance = state.balance
    if objectives.gradnorm:
        losses = {task: sums[f"task/{task}"] for task in tasks}
        norms = {task: spec.weight * jnp.sqrt(sums[f"slope/{task}"]) for task, spec in tasks.items()}
        balance = {**balance, **objectives.gradnorm(balance, losses, norms)}
    count = total(jnp.sum(batch.weight))
    grad_norm = optax.tree.norm(grads)
    opt_state = optim.with_learning_rate(state.opt_state, learning_rate)
    held = freeze.held(state.params, state.step)
    updates, opt_state = optimizer.update(grads, opt_state, state.params, held=held)
    if scale is not None:
        updates = scale(updates)
    if freeze:
        updates = jax.tree.map(lambda x, stays: jnp.where(stays, jnp.zeros_like(x), x), updates, held)
        stay = freeze.held(batch_stats, state.step)
        batch_stats = jax.tree.map(jnp.where, stay, state.batch_stats, batch_stats)
    finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
    after = state.replace(
        params=optax.apply_updates(state.params, updates), batch_stats=batch_stats, opt_state=opt_state, balance=balance
    )
    sound, metrics = finite, {}
    if spike:
        far = skip_step.is_spike(state.recent, sums["loss"], spike)
        sound, metrics["spike"] = finite & ~far, 1.0 * (finite & far)
        after = after.replace(recent=skip_step.remember(state.recent, sums["loss"]))
    # A step whose numbers went wrong leaves no trace: chosen with `where`, since NaN times zero is NaN.
    after = jax.tree.map(lambda new, old: jnp.where(sound, new, old), after, state)
    weighed = task_weights
    if model.uncertain:
        weighed = {
            task: UNCERTAIN.get(spec.kind, 1.0) * jnp.exp(-state.params[f"log_variance_{task}"])
            for task, spec in tasks.items()
        }
    metrics |= {
        "loss": sums["loss"],
        "grad_norm": grad_norm,
        "weight": count,
        "ids": total(digest(batch.id)),
        "skipped": 1.0 - finite,
        **{name: value for name, value in sums.items() if name.startswith(("objective/", "score/", "task/"))},
        **{f"weight/{name}": weight for name, weight in (weighed | state.balance.get("heads", {})).items()},
        **{name: sums[name] / jnp.maximum(count, 1) for name in _classified(tasks)},
    }
    return after.replace(step=state.step + 1), metrics


def eval_step(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    model: nn.Module,
    tasks: Mapping[str, Task],
    preprocess: Preprocess,
    axis_name: str | None,
    heads: bool = False,
) -> dict[str, Any]:
    """Returns `logits`, `targets` and `loss` per task `[B, ...]`, `weight` and `id` `[B]`, of all devices' rows.

    With `heads`, the losses of the modalities' own heads, too: `unimodal` per task and modality `[B]`, and `present`.
    """
    outputs = model.apply({"params": params, "batch_stats": batch_stats}, preprocess(batch, None), train=False)
    result = {
        "logits": outputs.logits,
        "loss": {task: task_loss(outputs.logits[task], batch.targets[task], spec) for task, spec in tasks.items()},
        "loss_weight": {task: _weight(batch, task, spec) for task, spec in tasks.items()},
        "targets": batch.targets,
        "weight": batch.weight,
        "id": batch.id,
    }
    if heads:
        result["present"] = outputs.present
        result["unimodal"] = {
            task: {m: task_loss(logits, batch.targets[task], tasks[task]) for m, logits in each.items()}
            for task, each in outputs.unimodal.items()
        }
    if axis_name is None:
        return result
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis_name, tiled=True), result)


def _total(axis_name: str | None) -> Callable[[Any], Any]:
    return lambda tree: jax.lax.psum(tree, axis_name) if axis_name else tree


def by_uncertainty(loss: jax.Array, log_variance: jax.Array, share: jax.Array, spec: Task) -> jax.Array:
    """Returns a task's loss weighed by a learned variance s² = e^v (Kendall et al. 2018, arXiv:1705.07115).

    L / s² + v / 2, or L / (2 s²) + v / 2 of regression; `share` is the part of the batch's weight that is here, so that
    v / 2 is added once over devices and micro-batches.
    """
    return UNCERTAIN.get(spec.kind, 1.0) * jnp.exp(-log_variance) * loss + share * log_variance / 2


def _weight(batch: Batch, task: str, spec: Task) -> jax.Array:
    return task_weight(batch.targets[task], batch.weight, spec)


def _counted(batch: Batch, model: Any, objective: str) -> jax.Array:
    """Returns each row's weight `[B]` in the mean of an auxiliary objective: 0 where it has too few modalities."""
    return batch.weight * counts(model.presence(batch), model.auxiliaries[objective].fewest)


def _first_classified(tasks: Mapping[str, Task]) -> str | None:
    return next((task for task, spec in tasks.items() if spec.kind == "classification"), None)


def _presence(batch: Batch, model: Any, scored: str | None) -> dict[str, jax.Array]:
    """Returns per modality which rows `[B]` have it, where modalities are scored; else nothing."""
    return model.presence(batch) if scored else {}


def _probability(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the probability `[B]` that logits `[B, C]` give the right class."""
    return jnp.take_along_axis(jax.nn.softmax(logits.astype(jnp.float32)), target[:, None], axis=1)[:, 0]


def _classified(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Names of the running accuracies: `accuracy` for one classification task, else one a task."""
    classified = [task for task, spec in tasks.items() if spec.kind == "classification"]
    return {"accuracy" if len(classified) == 1 else f"{task}/accuracy": task for task in classified}
