"""Opens a trained run at its best checkpoint."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

from etils import epath
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.checkpoints.checksums import CHECKSUM
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.config import RunConfig
from mmfusion.data import dataset as datasets
from mmfusion.data import trust
from mmfusion.distributed import mesh
from mmfusion.errors import UserError
from mmfusion.training import seal
from mmfusion.training.setup import TrainSetup, build_setup


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run at its best checkpoint.

    `workdir` and `config_dict`, its config, are as they were given; `checkpoint` is the checksum of the metadata.
    """

    workdir: str
    config: RunConfig
    config_dict: ConfigDict
    dataset: datasets.Dataset
    setup: TrainSetup
    state: Any
    step: int
    checkpoint: str


def read_config(workdir: str | Path) -> ConfigDict:
    """Returns the config of a run directory, local or in a bucket; raises UserError where it is none."""
    folder = epath.Path(workdir)
    if not (folder / seal.FILE).is_file():
        raise UserError("is no run directory: it has no config.json; train into it first", path=str(workdir))
    return configs.from_json(trust.checked(seal.read_config(folder, folder / "checkpoints"), folder / seal.FILE))


def open_checkpoints(workdir: str | Path, config: ConfigDict) -> Checkpoints:
    """Returns the checkpoints of a run directory, readonly; raises UserError where one is of another config."""
    check = functools.partial(seal.check_checkpoint, configs.to_json(config), f"{workdir}/{seal.FILE}")
    return Checkpoints(epath.Path(workdir) / "checkpoints", readonly=True, check=check)


def trust_run(workdir: str | Path) -> None:
    """Trusts the code and the places that a run's config names, now and later; see `mmfusion.data.trust`."""
    path = epath.Path(workdir) / seal.FILE
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
    config_dict = read_config(workdir)
    if not (epath.Path(workdir) / "checkpoints").is_dir():
        raise UserError("has no checkpoints yet", path=str(workdir))
    checkpoints = open_checkpoints(workdir, config_dict)
    if overrides:
        overrides(config_dict)
    config = fitted_config(config_dict)

    def read(step: int) -> Run:
        saved = checkpoints.meta(step)["data"]
        dataset = datasets.load(config.data, seed=config.seed, splits=tuple(splits), saved=saved)
        setup = build_setup(config, dataset)
        state, meta = checkpoints.restore(step, setup.state_shapes())
        state = setup.partitioner.put_state(state)
        return Run(str(workdir), config, config_dict, dataset, setup, state, step, meta[CHECKSUM])

    run = checkpoints.first_valid(read, best=True)
    checkpoints.close()
    if run is None:
        raise UserError("has no checkpoint yet", path=str(workdir))
    return run
