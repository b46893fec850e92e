"""Lists and verifies a run's checkpoints; shows, compares or copies them.

`python -m experiments.checkpoints DIR [--tree=STEP] [--compare=STEP,STEP] [--copy=STEP --to=DIR]`

DIR is a run's directory or its `checkpoints/`, which is not modified. Exit status 1 if a checkpoint is corrupt.
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from experiments import cli
from mmfusion.checkpoints.verify import is_step
from mmfusion.errors import UserError

TREE = flags.DEFINE_string("tree", "", "list the arrays of this step")
COMPARE = flags.DEFINE_string("compare", "", "STEP,STEP: show the relative change of each array between two steps")
COPY = flags.DEFINE_string("copy", "", "verify this step and copy it to --to")
TO = flags.DEFINE_string("to", "", "a directory that does not exist yet")


def main(argv: Sequence[str]) -> None:
    directories = cli.parse(argv, positional=True)
    if len(directories) != 1:
        raise UserError("give one directory: python -m experiments.checkpoints DIR")
    folder = epath.Path(directories[0])
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    paths = folder.iterdir() if folder.is_dir() else ()
    steps = sorted((path.name for path in paths if is_step(path)), key=int)
    if not steps:
        raise UserError("has no checkpoints", path=str(folder))
    if COPY.value and (not TO.value or epath.Path(TO.value).exists()):
        raise UserError("give a directory that does not exist yet", path="--to", value=TO.value)
    pair = COMPARE.value.split(",") if COMPARE.value else []
    if pair and len(pair) != 2:
        raise UserError("must be STEP,STEP", path="--compare", value=COMPARE.value)
    for step in filter(None, (TREE.value, COPY.value, *pair)):
        if step not in steps:
            raise UserError(f"{folder} has no such step", path="step", value=step, choices=steps)

    if TREE.value:
        show_tree(folder, TREE.value)
    elif pair:
        compare(folder, *pair)
    elif COPY.value:
        copy(folder, COPY.value, epath.Path(TO.value))
    elif not list_steps(folder, steps):
        sys.exit(1)


def copy(folder: epath.Path, step: str, target: epath.Path) -> None:
    """Verifies a step and copies it; a failed copy is removed."""
    from mmfusion.files import copy_tree

    verified(folder, step)
    try:
        copy_tree(folder / step, target)
        verified(target.parent, target.name)
    except (OSError, UserError) as error:
        target.rmtree(missing_ok=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{reason}; the partial copy was removed", path="--to", value=str(target)) from error
    print(f"step {step} is in {target}")


def verified(folder: epath.Path, step: str) -> tuple[dict, dict]:
    """Returns a step's arrays by path and its metadata; raises UserError if the checkpoint is corrupt."""
    from mmfusion.checkpoints.manager import load_verified

    return load_verified(folder / step)


def list_steps(folder: epath.Path, steps: Sequence[str]) -> bool:
    """Prints one line per step, and returns whether all checkpoints are valid."""
    lines, valid = [], True
    for step in steps:
        try:
            arrays, meta = verified(folder, step)
            if str(meta["step"]) != step:
                raise UserError(f"{step} is the checkpoint of step {meta['step']}")
            score = "" if meta["score"] is None else f"{meta['score']:.5g}"
            size = sum(x.nbytes for x in arrays.values()) / 1e6
            lines.append((step, score, f"{len(arrays)}", f"{size:.1f}", "valid"))
        except UserError as error:
            valid = False
            lines.append((step, "?", "?", "?", str(error).partition(f"{step} ")[2]))
    cli.show_table(("step", "score", "arrays", "MB", ""), lines, "", None)
    return valid


def show_tree(folder: epath.Path, step: str) -> None:
    """Prints the path, shape and dtype of each array, and the total size."""
    arrays, _ = verified(folder, step)
    rows = [(path, "x".join(map(str, x.shape)), f"{x.dtype}") for path, x in arrays.items()]
    cli.show_table(("array", "shape", "type"), rows, "", None)
    print(f"{sum(x.size for x in arrays.values()):,} values in {len(arrays)} arrays")


def compare(folder: epath.Path, first: str, second: str) -> None:
    """Prints the change of each array between two steps relative to its norm, largest first."""
    import numpy as np

    (before, _), (after, _) = verified(folder, first), verified(folder, second)
    rows = []
    for path in sorted({*before, *after}):
        if path not in before or path not in after:
            rows.append((np.inf, path, f"only in {first if path in before else second}"))
        elif before[path].shape != after[path].shape:
            rows.append((np.inf, path, f"{before[path].shape} and {after[path].shape}"))
        elif (before[path] != after[path]).any():
            a, b = (np.asarray(x[path], np.float64) for x in (before, after))
            change = float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-12))
            rows.append((change, path, f"{change:.3g}"))
    rows.sort(key=lambda row: -row[0])
    cli.show_table(("array", "relative change"), [row[1:] for row in rows], "", None)
    print(f"{len(rows)} of {len({*before, *after})} arrays differ")


if __name__ == "__main__":
    cli.run(main)
