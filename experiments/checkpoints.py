"""Lists a run's checkpoints and whether each is what was saved; shows, compares or copies them.

`python -m experiments.checkpoints DIR [--tree=STEP] [--compare=STEP,STEP] [--copy=STEP --to=DIR]`

Nothing is changed below DIR, a run's directory or its `checkpoints/`. Exit status 1 where one is damaged.
"""

import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from experiments import cli
from mmfusion.errors import UserError, nearest

TREE = flags.DEFINE_string("tree", "", "a step whose arrays are listed")
COMPARE = flags.DEFINE_string("compare", "", "two steps, STEP,STEP: how far each array moved")
COPY = flags.DEFINE_string("copy", "", "a step that is copied to --to, once it was verified")
TO = flags.DEFINE_string("to", "", "a directory that is not there yet")


def main(argv: Sequence[str]) -> None:
    named = cli.parse(argv, positional=True)
    if len(named) != 1:
        raise UserError("give one directory: python -m experiments.checkpoints DIR")
    folder = epath.Path(named[0])
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    there = folder.iterdir() if folder.is_dir() else ()
    steps = sorted((path.name for path in there if path.name.isdigit()), key=int)
    if not steps:
        raise UserError(f"{folder} has no checkpoints")
    if COPY.value and (not TO.value or epath.Path(TO.value).exists()):
        raise UserError(f"--to={TO.value}: give a directory that is not there yet")
    pair = COMPARE.value.split(",") if COMPARE.value else []
    if pair and len(pair) != 2:
        raise UserError(f"--compare={COMPARE.value} is not STEP,STEP")
    for step in filter(None, (TREE.value, COPY.value, *pair)):
        if step not in steps:
            raise UserError(f"{folder} has no step {step}: {nearest(step, steps)}")

    if TREE.value:
        show_tree(folder, TREE.value)
    elif pair:
        compare(folder, *pair)
    elif COPY.value:
        copy(folder, COPY.value, epath.Path(TO.value))
    elif not list_steps(folder, steps):
        sys.exit(1)


def copy(folder: epath.Path, step: str, target: epath.Path) -> None:
    """Copies a step that is what was saved; nothing is left where it cannot be copied whole."""
    from mmfusion.files import copy_tree

    verified(folder, step)
    try:
        copy_tree(folder / step, target)
        verified(target.parent, target.name)
    except (OSError, UserError) as error:
        target.rmtree(missing_ok=True)
        raise UserError(f"--to={target}: {getattr(error, 'strerror', None) or error}; nothing is left there") from error
    print(f"step {step} is in {target}")


def verified(folder: epath.Path, step: str) -> tuple[dict, dict]:
    """Returns a step's arrays by path and what was saved beside them; raises UserError where it is damaged."""
    from mmfusion.checkpoints.manager import load_verified

    return load_verified(folder / step)


def list_steps(folder: epath.Path, steps: Sequence[str]) -> bool:
    """Prints a line a step, and returns whether all are what was saved."""
    lines, sound = [], True
    for step in steps:
        try:
            arrays, meta = verified(folder, step)
            score = "" if meta["score"] is None else f"{meta['score']:.5g}"
            size = sum(x.nbytes for x in arrays.values()) / 1e6
            lines.append((step, score, f"{len(arrays)}", f"{size:.1f}", "as it was saved"))
        except UserError as error:
            sound = False
            lines.append((step, "?", "?", "?", str(error).partition(f"{step} ")[2]))
    cli.show_table(("step", "score", "arrays", "MB", ""), lines, "", None)
    return sound


def show_tree(folder: epath.Path, step: str) -> None:
    """Prints each array's path, shape, type and size."""
    arrays, _ = verified(folder, step)
    rows = [(path, "x".join(map(str, x.shape)), f"{x.dtype}") for path, x in arrays.items()]
    cli.show_table(("array", "shape", "type"), rows, "", None)
    print(f"{sum(x.size for x in arrays.values()):,} numbers in {len(arrays)} arrays")


def compare(folder: epath.Path, first: str, second: str) -> None:
    """Prints how far each array moved from one step to another, relative to its own size, the farthest first."""
    import numpy as np

    (one, _), (other, _) = verified(folder, first), verified(folder, second)
    rows = []
    for path in sorted({*one, *other}):
        if path not in one or path not in other:
            rows.append((np.inf, path, f"only in {first if path in one else second}"))
        elif one[path].shape != other[path].shape:
            rows.append((np.inf, path, f"{one[path].shape} and {other[path].shape}"))
        elif (one[path] != other[path]).any():
            a, b = (np.asarray(x[path], np.float64) for x in (one, other))
            moved = float(np.linalg.norm(b - a) / max(np.linalg.norm(a), 1e-12))
            rows.append((moved, path, f"{moved:.3g}"))
    rows.sort(key=lambda row: -row[0])
    cli.show_table(("array", "relative change"), [row[1:] for row in rows], "", None)
    print(f"{len(rows)} of {len({*one, *other})} arrays differ")


if __name__ == "__main__":
    cli.run(main)
