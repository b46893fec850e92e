"""A small quickstart, which most tests train, as a config and as command-line flags."""

from typing import Any

from ml_collections import ConfigDict

from configs import quickstart
from mmfusion.config import choose

# 256 rows, a model of a few thousand parameters, dropout on: a step takes milliseconds, a program seconds to compile.
TINY: dict[str, Any] = {
    "steps": 8,
    "batch_size": 16,
    "eval_every": 4,
    "checkpoint_every": 4,
    "log_every": 1,
    "data.train": "train[:256]",
    "data.test": "test[:64]",
    "data.modalities.text.length": 8,
    "model.width": 8,
    "model.encoders.image.channels": (4, 8),
    "model.encoders.image.strides": (4, 2),
    "model.encoders.text.name": "bow",  # a recurrent network takes longer to compile
    "model.encoders.text.tokens": "all",
    "model.encoders.text.dropout": 0.1,
    "model.fusion.layers": 1,
    "model.fusion.heads": 2,
    "model.fusion.dropout": 0.1,
}
FUSION = "fusion=concat"  # unless a test names another: attention takes three times as long to compile


def config(arg: str = "", changes: dict[str, Any] | None = None) -> ConfigDict:
    """Returns `configs/quickstart.py:arg`, of `FUSION` by default, with `TINY` and then `changes`, by dotted path.

    A path of `changes` must exist in the config; a path of `TINY` that does not is ignored, as with another fusion
    strategy or fewer modalities.
    """
    result = quickstart.get_config(arg if "fusion=" in arg else ",".join(filter(None, [FUSION, arg])))
    for path, value in TINY.items():
        if path.endswith(".name") and has(result, path):
            choose(result, path.removesuffix(".name"), value)
        elif has(result, path):
            put(result, path, value)
    for path, value in (changes or {}).items():
        put(result, path, value)
    return result.lock()


def flags(changes: dict[str, Any]) -> list[str]:
    """Returns the same as the flags `--config=` and `--config.path=value`; None omits a path."""
    values = {**TINY, "model.fusion.heads": None, **changes}  # concatenation has no heads
    given = [f"--config.{path}={value}" for path, value in values.items() if value is not None]
    return [f"--config=configs/quickstart.py:{FUSION}", *given]


def has(config: ConfigDict, path: str) -> bool:
    """Returns whether the config has a value at a dotted path."""
    for part in path.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


def put(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the value at a dotted path; raises KeyError if the config does not have the path."""
    if not has(config, path):
        raise KeyError(f"config.{path}")
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    with config.unlocked(), config.ignore_type():
        config[name] = value
