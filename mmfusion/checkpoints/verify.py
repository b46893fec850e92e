"""Verifies the contents of a checkpoint: its JSON and the checksums of its arrays."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mmfusion.checkpoints.checksums import checksums, has_valid_checksum
from mmfusion.errors import Unreachable, UserError

META = "meta"  # the item saved beside the state
STEP = re.compile("0|[1-9][0-9]*")  # name of a checkpoint's folder
# Parts of TensorStore's messages for errors that may pass.
TRANSIENT = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Too many open files")


class CorruptCheckpoint(UserError):
    """A checkpoint that differs from what was saved.

    Args:
      message: as of `UserError`.
      step: its step; 0 where its folder is a copy with another name.
    """

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step


def is_step(folder: epath.Path) -> bool:
    """Returns whether a folder has the name of a checkpoint.

    Raises:
      UserError: its name is of other digits, such as ² or 007, which Orbax would take for another step or fail on.
    """
    if folder.name.isdigit() and not STEP.fullmatch(folder.name):
        raise UserError("is not named like a checkpoint: move it away", path=str(folder))
    return folder.name.isdigit()


def validation_error(folder: epath.Path) -> str:
    """Returns what is wrong with the metadata of a checkpoint, which is small; "" where it is valid.

    Raises:
      UserError: it may not be read.
      Unreachable: it cannot be read for now.
    """
    try:
        meta = json.loads((folder / META / "metadata").read_text())
        metrics = json.loads((folder / "metrics" / "metrics").read_text())
        valid = (
            has_valid_checksum(meta)
            and {"score", "step"} <= metrics.keys()
            and metrics.items() <= retention_metrics(meta).items()
        )
    except PermissionError as error:
        raise UserError("the checkpoint cannot be read: permission denied", path=str(folder)) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _raise_if_transient(folder, error)
        return f"its metadata cannot be read ({_one_line(error)})"
    return "" if valid else "its metadata is not what was saved"


def read_meta(folder: epath.Path) -> dict[str, Any]:
    """Returns the metadata of a checkpoint; raises CorruptCheckpoint where it is not valid."""
    if error := validation_error(folder):
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {error}", _step(folder))
    return json.loads((folder / META / "metadata").read_text())


def retention_metrics(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values that decide which checkpoints are kept; `wrong` counts the bad steps just before it."""
    counts = meta.get("progress", {}).get("bad_steps", {})
    return {"score": meta["score"], "step": meta["step"], "wrong": counts.get("consecutive", 0)}


def verify_checksums(folder: epath.Path, state: Any, meta: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpoint where an array of a state does not have its checksum in the metadata."""
    found, saved = checksums(state), meta["sums"]
    if wrong := sorted(path for path in {*found, *saved} if found.get(path) != saved.get(path)):
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CorruptCheckpoint(
            f"checkpoint {folder} is damaged: {wrong[0]}{others} is not what was saved", _step(folder)
        )


@contextlib.contextmanager
def read_errors(folder: epath.Path) -> Iterator[None]:
    """Turns errors of reading arrays into CorruptCheckpoint, or into Unreachable where the files are not at fault."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
            raise UserError("the checkpoint cannot be read: permission denied", path=str(folder)) from error
        _raise_if_transient(folder, error)
        raise CorruptCheckpoint(
            f"checkpoint {folder} is damaged: it cannot be read ({_one_line(error)})", _step(folder)
        ) from error


def _raise_if_transient(folder: epath.Path, error: Exception) -> None:
    """Raises Unreachable where the machine or the network is at fault, and the files may be intact.

    A MemoryError is raised again: trying later does not help.
    """
    if isinstance(error, MemoryError):
        raise error
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    if (isinstance(error, OSError) and not missing) or any(part in str(error) for part in TRANSIENT):
        message = f"checkpoint {folder} cannot be read for now ({_one_line(error)}): try again later"
        raise Unreachable(message) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _step(folder: epath.Path) -> int:
    return int(folder.name) if STEP.fullmatch(folder.name) else 0  # a copy may have any name
