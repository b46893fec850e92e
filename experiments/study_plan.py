"""Parses the flags of a study: the config of each dataset, and the command of its ablation."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from mmfusion.errors import UserError

NEXT_CONFIG = re.compile(r",(?=[^,:=]+\.py(?:[:,]|$))")  # a value of an argument may be a file, and has = before it


def named_sources(given: Sequence[str]) -> dict[str, str]:
    """Returns the configs of `--configs` by the name of their dataset: the file's, and the values of its arguments.

    Raises:
      UserError: there is none, or two have the same name.
    """
    found: dict[str, str] = {}
    for source in filter(None, (item for text in given for item in NEXT_CONFIG.split(text))):
        path, _, arg = source.partition(":")
        values = [item.partition("=")[2] for item in arg.split(",") if item]
        name = re.sub(r"[^\w.+-]", "-", "_".join([Path(path).stem, *values]))
        if name in found:
            message = f"is given twice, or has the name {name!r} in common with {found[name]}"
            raise UserError(message, path="--configs", value=source)
        found[name] = source
    if not found:
        raise UserError("is required: give config files, such as configs/leaf.py,configs/fashion.py", path="--configs")
    return found


def ablate_command(argv: Sequence[str], source: str, directory: Path) -> str:
    """Returns the command of the ablation of one dataset."""
    _, rest = cli.take_flag(list(argv), "configs")
    _, rest = cli.take_flag(rest, "workdir")
    command = ["python", "-m", "experiments.ablate", f"--config={source}", *rest[1:], f"--workdir={directory}"]
    return shlex.join(command)
