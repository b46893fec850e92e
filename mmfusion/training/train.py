"""Trains a config that is given as an object or as a config file; the function of `mmfusion.train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.config.files import load_file, set_values
from mmfusion.config.published import adopt
from mmfusion.training import loop


def train(
    config: ConfigDict | str | Path,
    workdir: str | Path,
    *,
    changes: Mapping[str, Any] | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains a config in a directory; the same call continues a run that was interrupted.

    Args:
      config: a config, or a config file in any folder, `path/to/X.py[:arg=value,...]`.
      workdir: the run's directory, local or in a bucket (`gs://...`). It receives `config.json`, `metrics.jsonl`,
        TensorBoard events, `checkpoints/` and `result.json`.
      changes: values by dotted path, such as `{"steps": 100, "optim.name": "sgd"}`.
      profile: write a JAX trace of a few early steps to `workdir/profile`.

    Returns:
      The content of `result.json`: `test` and `valid` metrics of the best checkpoint, `parameters`, `seconds`, ...

    Raises:
      UserError: the config, the data or the directory is wrong; the message says what would be right.
      FloatingPointError: too many consecutive steps diverged.
      Preempted: SIGTERM or Ctrl-C arrived; the run saved a checkpoint, unless it had not taken a step.
      KeyboardInterrupt: a second Ctrl-C arrived.
    """
    result = config.copy_and_resolve_references() if isinstance(config, ConfigDict) else load_file(config)
    set_values(result, changes or {})
    adopt(result)
    configs.check(result.lock())
    return loop.train(result, workdir, profile=profile)
