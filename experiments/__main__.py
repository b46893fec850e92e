"""Runs `experiments.COMMAND` for `mmfusion COMMAND ...` and `python -m experiments COMMAND ...`."""

import ast
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mmfusion.errors import nearest

COMMANDS = (
    "inspect",
    "to_table",
    "train",
    "evaluate",
    "predict",
    "demo",
    "export",
    "ablate",
    "study",
    "compare",
    "baselines",
    "gate",
    "belief",
    "list_fusions",
    "checkpoints",
    "reproduce",
    "debug_step",
    "benchmark",
)
OLD_NAMES = ("fusions", "known_answer", "replay", "rerun")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command, or lists all commands if none is given. An unknown command exits with status 2."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return
    if name not in (*COMMANDS, *OLD_NAMES):
        print(f"error: no command {name!r}; {nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"experiments.{name}", *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)


def usage() -> str:
    """Returns the usage text, with one line per command."""
    lines = [f"  {name:<14}{summary(name)}" for name in COMMANDS]
    return "\n".join(
        ["usage: mmfusion COMMAND [--flag=value ...]    (or python -m experiments.COMMAND)", "", *lines, "",
         "mmfusion COMMAND --help lists the flags; experiments/README.md has examples."]
    )  # fmt: skip


def summary(name: str) -> str:
    """Returns the first line of a command's docstring, without importing it."""
    folder = Path(__file__).parent
    path = folder / f"{name}.py"
    if not path.exists():
        path = folder / name / "__main__.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0]


if __name__ == "__main__":
    main()
