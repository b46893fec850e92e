"""Checks a config before anything is built: the first thing that is wrong, in one line."""

import jax
from ml_collections import ConfigDict

from mmfusion.config.checks import check_member, check_section
from mmfusion.config.data_checks import check_data
from mmfusion.config.encoder_checks import check_encoders
from mmfusion.config.fields import RunConfig, read
from mmfusion.config.keys import declared_keys, key_of
from mmfusion.distributed.mesh import resolved_mode
from mmfusion.errors import UserError
from mmfusion.metrics import METRICS, REGRESSION_GROUPS
from mmfusion.objectives import check_objectives, group_size
from mmfusion.tracking.sinks import check_tracking


def _resumable(reason: str) -> tuple[str, ...]:
    return tuple(path for path, field in declared_keys(RunConfig) if (key := key_of(field)) and key.resume == reason)


# Keys that may differ when a run is continued or repeated: where things are and how fast, never what is computed.
RESOURCE_KEYS = _resumable("resource")
# Keys that may differ when a run is continued: what it does about failures, and how its step is compiled.
RECOVERY_KEYS = _resumable("recovery")
LAST = "last"  # the value of `select` that is no metric: the newest checkpoint is tested


def selectable(config: ConfigDict | RunConfig) -> dict[str, bool]:
    """Returns the metrics of `config.select`, and whether higher is better; `TASK/metric` of several tasks."""
    targets = (config if isinstance(config, RunConfig) else read(config)).data.targets
    metrics = {}
    for task, target in targets.items():
        groups = [REGRESSION_GROUPS[group] for group in target.options.get("metrics", ())]
        for own in (METRICS[target.kind], *groups):
            metrics |= {metric if len(targets) == 1 else f"{task}/{metric}": higher for metric, higher in own.items()}
    return {**metrics, "loss": False}


def selected_metric(config: ConfigDict) -> str:
    """Returns `config.select`, or the first metric where that is `last`."""
    return next(iter(selectable(config))) if config.select == LAST else config.select


def check(config: ConfigDict, devices: int | None = None, hosts: int = 1) -> None:
    """Checks a whole config before anything is built.

    Args:
      config: the config of a run.
      devices: how many devices there are, over all hosts; None: those that JAX finds here.
      hosts: the number of hosts.

    Raises:
      UserError: the first thing that is wrong, where it is, and what would be right.
    """
    check_section(config, RunConfig)
    run = read(config)
    check_objectives(run)
    check_data(run)
    check_encoders(run)
    _check_select(run)
    check_tracking(run.tracking)
    _check_devices(run, group_size(run), jax.device_count() if devices is None else devices, hosts)


def _check_select(run: RunConfig) -> None:
    check_member(run.select, {**selectable(run), LAST: True}, "select", "metric")
    if run.select != LAST:
        return
    if run.early_stopping:
        message = f"needs a metric that may improve, and config.select is {LAST!r}"
        raise UserError(message, path="config.early_stopping", value=run.early_stopping)
    if run.optim.schedule.name == "plateau":
        message = f"needs a metric that may improve, and config.select is {LAST!r}"
        raise UserError(message, path="config.optim.schedule.name", value="plateau")


def _check_devices(run: RunConfig, group: int, devices: int, hosts: int) -> None:
    used, mesh = run.parallel.devices or devices, run.parallel.mesh
    if used > devices:
        raise UserError(f"this machine has {devices}", path="config.parallel.devices", value=used)
    if hosts > 1 and used != devices:
        message = f"{hosts} hosts use all of their {devices} devices: set 0"
        raise UserError(message, path="config.parallel.devices", value=used)
    if devices // hosts % mesh.model:
        message = f"must divide the {devices // hosts} devices of each host, since a host's devices share its examples"
        raise UserError(message, path="config.parallel.mesh.model", value=mesh.model)
    state_parts = mesh.fsdp * mesh.model
    if state_parts > 1 and resolved_mode(run.parallel.mode, hosts) != "jit":
        message = "fsdp and model divide the state, which needs --config.parallel.mode=jit"
        raise UserError(message, path="config.parallel.mesh")
    if used % state_parts or mesh.data not in (-1, used // state_parts):
        raise UserError(
            f"{mesh.data} x {mesh.fsdp} x {mesh.model} are not the {used} devices: choose fsdp and model whose product "
            "divides them, and data=-1",
            path="config.parallel.mesh",
        )
    parts = used // mesh.model * run.optim.accumulate * group
    if run.batch_size % parts:
        below, above = run.batch_size // parts * parts, -(-run.batch_size // parts) * parts
        sizes = " or ".join(str(size) for size in (below, above) if size)
        groups = f" of groups of {group} rows" if group > 1 else ""
        raise UserError(
            f"does not divide over {used // mesh.model} devices x {run.optim.accumulate} micro-batches{groups}: "
            f"choose {sizes}",
            path="config.batch_size",
            value=run.batch_size,
        )
