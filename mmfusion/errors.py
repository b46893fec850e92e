"""Errors that end a command with one line; `experiments/cli.py` maps each to an exit status."""

import contextlib
import difflib
import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class UserError(Exception):
    """The user's input is wrong (exit status 2).

    Its text is one line: `path=value: message; did you mean ...?`

    Args:
      message: what is wrong, and what would be right.
      path: a config key (`config.optim.name`), a flag, a file or a column.
      value: the value given there; leave it out where the message contains it.
      choices: the valid values; the line ends with the nearest of them.
    """

    def __init__(self, message: str, *, path: str = "", value: Any = None, choices: Iterable[str] = ()):
        self.message, self.path, self.value, self.choices = message, path, value, sorted(choices)
        where = shortened(path if value is None else f"{path}={value!r}")
        text = f"{where}: {message}" if where else message
        given = path.rpartition(".")[2] if value is None else value  # of a key that is wrong itself, its last part
        super().__init__(f"{text}; {nearest(given, self.choices)}" if self.choices else text)


def shortened(text: str, limit: int = 500) -> str:
    """Returns a text that fits a line: a path may have thousands of characters."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


class Preempted(Exception):
    """The run was asked to stop and has been saved; the same command continues it (exit status 75)."""


class StoppedEarly(Preempted):
    """The run was asked to stop before it took a step, so that there is nothing to save (exit status 75)."""


class Unreachable(Exception):
    """Stored files cannot be read for now, but need not be damaged: try again later (exit status 75)."""


def nearest(name: Any, choices: Iterable[str]) -> str:
    """Returns the end of an error line: the nearest choices, or the first thirty where none is similar."""
    choices = sorted(choices)
    if not choices:
        return "there are no choices"
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(choices) - 30} more" if len(choices) > 30 else ""
    return f"choose one of {', '.join(choices[:30])}{more}"


@functools.cache  # once a process: an ablation makes a config for each run
def warn_renamed(old: str, new: str) -> None:
    """Prints the new name of something that was renamed on standard error."""
    print(f"warning: {old} is now called {new}", file=sys.stderr)


def one_line(error: BaseException, limit: int = 240) -> str:
    """Returns an error's text on one line, truncated to `limit` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextlib.contextmanager
def storage_errors(name: str) -> Iterator[None]:
    """Turns any error of a bucket's client library, which has many kinds, into a UserError of one line."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"gs:// needs `pip install gcsfs` ({error})", path=name) from error
    except Exception as error:
        raise UserError(f"cannot be reached: {' '.join(str(error).split())[:300]}", path=name) from error
