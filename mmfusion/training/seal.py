"""The seal of a run: `config.json` is what was written, and each checkpoint is of this config.

Each checkpoint holds under a checksum the config, the vocabularies, the columns, the class names and the scales that it
was trained with; `config.json` has a checksum of its own. They show damage and mix-ups, not forgery: see SECURITY.md.
"""

import functools
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.checkpoints.checksums import CHECKSUM, has_valid_checksum, with_checksum
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.data import trust
from mmfusion.errors import UserError
from mmfusion.files import to_builtin, write_json
from mmfusion.tracking.run_dir import RunDir

FILE = "config.json"
CHANGEABLE = frozenset({*configs.RESOURCE_KEYS, *configs.RECOVERY_KEYS})  # they may change as a run resumes
SHOWN = 3  # differences in an error
REMEDY = "restore it, or remove it and give the train command the config again"


def write_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes a config, as JSON values, to `config.json` with its checksum."""
    write_json(folder / FILE, with_checksum(to_builtin(values)))


def read_config(folder: epath.Path | Path, checkpoints: epath.Path) -> dict[str, Any]:
    """Returns the config of a run directory as JSON values, where `config.json` is what was written.

    Args:
      folder: has `config.json`.
      checkpoints: the folder of the run's checkpoints, from which the error says what has changed.

    Raises:
      UserError: the file is damaged or was edited.
    """
    path = epath.Path(folder) / FILE
    values = configs.read_json(path)
    if CHECKSUM not in values:
        _warn(f"{path} has no checksum, as it was written by an older version: damage may not be noticed")
    elif not has_valid_checksum(values):
        saved = _newest_config(checkpoints)
        found = _differences(_without_checksum(values), saved, ()) if saved else []
        raise UserError(f"is not what was written: {_text(found) or 'its checksum differs'}; {REMEDY}", path=str(path))
    return _without_checksum(values)


def check_checkpoint(values: Mapping[str, Any], path: str, meta: Mapping[str, Any]) -> None:
    """Raises UserError unless a checkpoint was written with a config.

    Args:
      values: the config as JSON values.
      path: what the error calls the config.
      meta: the metadata of the checkpoint.
    """
    if "config" not in meta:
        _warn(f"the checkpoint of step {meta['step']} does not say its config, as it was written by an older version")
        return
    check_config(values, path, meta["config"], f"the checkpoint of step {meta['step']}")


def check_config(values: Mapping[str, Any], path: str, saved: Mapping[str, Any], writer: str) -> None:
    """Raises UserError unless two configs compute the same.

    Args:
      values: a config as JSON values.
      path: what the error calls it.
      saved: another one.
      writer: what was written with the other one.
    """
    if not _differences(values, saved, CHANGEABLE):
        return
    both = (trust.checked(each, path) for each in (values, saved))
    mine, theirs = (configs.to_json(configs.from_json(each)) for each in both)  # with keys that are newer
    if found := _differences(mine, theirs, CHANGEABLE):
        raise UserError(
            f"{_text(found, writer)}: they are of different runs; restore the config or the checkpoints, whichever "
            "does not belong here",
            path=path,
        )


def check_owner(directory: RunDir, config: ConfigDict) -> None:
    """Raises UserError unless a run directory belongs to a config: where it has none, its checkpoints must."""
    mine = configs.to_json(config)
    if not (directory.folder / FILE).exists():
        if directory.checkpoints.is_dir():
            check = functools.partial(check_checkpoint, mine, directory.name)
            Checkpoints(directory.checkpoints, readonly=True, check=check).close()
        return
    values = read_config(directory.folder, directory.checkpoints)
    before = configs.from_json(trust.checked(values, directory.folder / FILE))
    if found := _differences(mine, configs.to_json(before), CHANGEABLE):
        key, value, saved = found[0]
        raise UserError(
            f"belongs to another run: its config.{key} is {saved}, here it is {value}; "
            "give another --workdir, or its own config",
            path=directory.name,
        )


def _differences(
    values: Mapping[str, Any], saved: Mapping[str, Any], ignored: Collection[str]
) -> list[tuple[str, str, str]]:
    """Returns each key in which two configs differ, with both values as text."""
    mine, theirs = (configs.flat(to_builtin(each)) for each in (values, saved))

    def text(each: dict[str, Any], key: str) -> str:
        return repr(each[key]) if key in each else "absent"

    return [
        (key, text(mine, key), text(theirs, key))
        for key in sorted({*mine, *theirs} - {*ignored})
        if key not in mine or key not in theirs or mine[key] != theirs[key]  # 1 is 1.0
    ]


def _text(differences: list[tuple[str, str, str]], writer: str = "the checkpoint") -> str:
    lines = [f"{key} is {value}, {writer} was written with {saved}" for key, value, saved in differences[:SHOWN]]
    more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
    return "; ".join([*lines, *more])


def _newest_config(checkpoints: epath.Path) -> dict[str, Any]:
    """Returns the config of the newest checkpoint as JSON values; empty where none can be read."""
    if not checkpoints.is_dir():
        return {}
    opened = Checkpoints(checkpoints, readonly=True)
    newest = opened.newest()
    opened.close()
    return {} if newest is None else opened.meta(newest).get("config", {})


def _without_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != CHECKSUM}


@functools.cache  # once a process
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
