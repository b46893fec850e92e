"""The evaluation step: a pure function of (parameters, batch), the same under `pmap` and under `jit`.

B batch
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.objectives import Task, task_loss, task_weight
from mmfusion.training.state import Preprocess


def eval_step(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    model: FusionModel,
    tasks: Mapping[str, Task],
    preprocess: Preprocess,
    axis_name: str | None,
    heads: bool = False,
) -> dict[str, Any]:
    """Returns the outputs of every row of all devices, `[B, ...]`.

    They are `logits`, `targets`, `loss`, `loss_weight` and `metric_weight` per task, `weight`, `id`, and `any_present`:
    whether a row has a modality. With `heads`, also the losses of each modality's own head: `unimodal` per task and
    modality, and `present`.
    """
    outputs: Any = model.apply({"params": params, "batch_stats": batch_stats}, preprocess(batch, None), train=False)
    result = {
        "logits": outputs.logits,
        "loss": {task: task_loss(outputs.logits[task], batch.targets[task], spec) for task, spec in tasks.items()},
        "loss_weight": {
            task: task_weight(batch.targets[task], batch.loss_weight(task), spec) for task, spec in tasks.items()
        },
        "metric_weight": {task: batch.metric_weight(task) for task in tasks},
        "targets": batch.targets,
        "weight": batch.weight,
        "any_present": jnp.stack(list(batch.present.values())).any(axis=0),
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
