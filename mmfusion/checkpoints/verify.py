"""Whether a checkpoint's folder holds what was saved: its JSON and its arrays, but not Orbax's ways of reading them."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mmfusion.checkpoints import checksums
from mmfusion.errors import Unreachable, UserError

META = "meta"  # the item beside the state
PASSING = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Too many open files")  # in TensorStore's errors


class CorruptCheckpoint(UserError):
    """A checkpoint, of a step, that is not what was saved."""

    def __init__(self, said: str, step: int = 0):
        super().__init__(said)
        self.step = step


def unsound(folder: epath.Path) -> str:
    """Returns what is wrong with what was saved beside the state, which is small; "" where it is as it was.

    Raises:
      UserError: it may not be read, or was saved by a version that knew no checksums.
      Unreachable: it cannot be read for now.
    """
    try:
        meta = json.loads((folder / META / "metadata").read_text())
        score = json.loads((folder / "metrics" / "metrics").read_text())
        if "tree" in meta and not {"sums", checksums.SEAL} & set(meta):
            raise UserError(f"checkpoint {folder} is of an earlier version, without checksums: begin again elsewhere")
        sound = checksums.is_sealed(meta) and {"score", "step"} <= score.keys()
        sound = sound and score.items() <= metrics_of(meta).items()
    except PermissionError as error:
        raise UserError(f"checkpoint {folder} cannot be read: permission denied") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        _let_pass(folder, error)
        return f"what was saved beside the state cannot be read ({' '.join(str(error).split())[:200]})"
    return "" if sound else "what was saved beside the state is not what it was"


def meta_of(folder: epath.Path) -> dict[str, Any]:
    """Returns what was saved beside the state of a checkpoint; raises CorruptCheckpoint where it is not that."""
    if why := unsound(folder):
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: {why}", _step(folder))
    return json.loads((folder / META / "metadata").read_text())


def metrics_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides which checkpoints are kept: `wrong` counts the updates just before that went wrong."""
    counts = meta.get("progress", {}).get("bad_steps", {})
    return {"score": meta["score"], "step": meta["step"], "wrong": counts.get("consecutive", 0)}


def check_sums(folder: epath.Path, state: Any, meta: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpoint where an array of a state is not the one whose checksum its meta has."""
    sums = checksums.checksums(state)
    if wrong := sorted(path for path in {*sums, *meta["sums"]} if sums.get(path) != meta["sums"].get(path)):
        more = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
        raise CorruptCheckpoint(
            f"checkpoint {folder} is damaged: {wrong[0]}{more} is not what was saved", _step(folder)
        )


@contextlib.contextmanager
def reading(folder: epath.Path) -> Iterator[None]:
    """Turns errors of reading into CorruptCheckpoint, or into Unreachable where the files are not at fault."""
    try:
        yield
    # Orbax and TensorStore have many kinds of exception for files that are broken.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        if isinstance(error, PermissionError) or "PERMISSION_DENIED" in said:
            raise UserError(f"checkpoint {folder} cannot be read: permission denied") from error
        _let_pass(folder, error)
        raise CorruptCheckpoint(f"checkpoint {folder} is damaged: it cannot be read ({said})", _step(folder)) from error


def _let_pass(folder: epath.Path, error: Exception) -> None:
    """Raises Unreachable where the machine or the network is at fault, and the files may be as they were.

    A MemoryError is raised again: later there is no more memory than now.
    """
    if isinstance(error, MemoryError):
        raise error
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    if (isinstance(error, OSError) and not missing) or any(word in str(error) for word in PASSING):
        said = " ".join(str(error).split())[:200]
        raise Unreachable(f"checkpoint {folder} cannot be read for now ({said}): try again later") from error


def _step(folder: epath.Path) -> int:
    return int(folder.name) if folder.name.isdigit() else 0  # a copy may have any name
