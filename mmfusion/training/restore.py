"""Opens a trained run at its best checkpoint."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

from etils import epath
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.config import RunConfig
from mmfusion.data import dataset as datasets
from mmfusion.data import trust
from mmfusion.distributed import mesh
from mmfusion.errors import UserError
from mmfusion.training.setup import TrainSetup, build_setup


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run at its best checkpoint; `workdir` and `config_dict`, its config, are as they were given."""

    workdir: str
    config: RunConfig
    config_dict: ConfigDict
    dataset: datasets.Dataset
    setup: TrainSetup
    state: Any
    step: int


def read_config(workdir: str | Path) -> ConfigDict:
    """Returns the config of a run directory, local or in a bucket; raises UserError where it is none."""
    path = epath.Path(workdir) / "config.json"
    if not path.is_file():
        raise UserError("is no run directory: it has no config.json; train into it first", path=str(workdir))
    return configs.from_json(trust.checked(configs.read_json(path), path))


def trust_run(workdir: str | Path) -> None:
    """Trusts the code and the places that a run's config names, now and later; see `mmfusion.data.trust`."""
    path = epath.Path(workdir) / "config.json"
    if path.is_file():
        trust.remember(configs.read_json(path))


def fitted_config(config: ConfigDict) -> RunConfig:
    """Returns a run's config, which is changed in place to use the devices of this machine."""
    run = configs.read(config)
    with config.unlocked():
        cast(ConfigDict, config.parallel).update(mesh.fit_to_machine(config.to_dict()["parallel"], run.batch_size))
    return configs.read(config)


def open_run(
    workdir: str | Path, splits: Collection[str], overrides: Callable[[ConfigDict], None] | None = None
) -> Run:
    """Opens a run directory at its best checkpoint.

    Args:
      workdir: of the run.
      splits: which to load; none gives a dataset without splits.
      overrides: changes the config in place, such as where the data is now.

    Raises:
      UserError: no run, no checkpoint, or a checkpoint of another architecture.
    """
    folder, config_dict = epath.Path(workdir) / "checkpoints", read_config(workdir)
    if overrides:
        overrides(config_dict)
    config = fitted_config(config_dict)
    if not folder.is_dir():
        raise UserError("has no checkpoints yet", path=str(workdir))
    checkpoints = Checkpoints(folder, readonly=True)

    def read(step: int) -> Run:
        saved = checkpoints.meta(step)["data"]
        dataset = datasets.load(config.data, seed=config.seed, splits=tuple(splits), saved=saved)
        setup = build_setup(config, dataset)
        state, _ = checkpoints.restore(step, setup.state_shapes())
        return Run(str(workdir), config, config_dict, dataset, setup, setup.partitioner.put_state(state), step)

    run = checkpoints.first_valid(read, best=True)
    checkpoints.close()
    if run is None:
        raise UserError("has no checkpoint yet", path=str(workdir))
    return run
