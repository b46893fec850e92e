"""Renamed to `configs/three_images.py`; this name works for one version."""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

from mmfusion.errors import warn_renamed


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of `configs/three_images.py`."""
    warn_renamed("configs/three_pictures.py", "configs/three_images.py")
    renamed = runpy.run_path(str(Path(__file__).with_name("three_images.py")))
    config = renamed["get_config"](arg.replace("label+shown", "label+num_informative"))
    if "label+shown" in arg:  # under its old name, the task's head has the same initial parameters as before
        with config.unlocked():
            config.data.targets.shown = config.data.targets.num_informative
            del config.data.targets.num_informative
    return config
