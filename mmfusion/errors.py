"""The ways a run ends early on purpose; `experiments/cli.py` turns each into its exit status."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """The user's input is wrong: one line that says what, where, and what would be right (exit status 2)."""


class Preempted(Exception):
    """The run was asked to stop and saved itself; the same command continues it (exit status 75)."""


class Unreachable(Exception):
    """What is stored cannot be read for now, and nothing says that it is damaged: try again later (exit status 75)."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns the end of an error line: the nearest choices, or the first thirty where none is near."""
    choices = sorted(choices)
    if not choices:
        return "there is none to choose"
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(choices) - 30} more" if len(choices) > 30 else ""
    return f"choose one of {', '.join(choices[:30])}{more}"


@contextlib.contextmanager
def reaching(name: str) -> Iterator[None]:
    """Turns what is raised where a bucket cannot be reached into one line; what reads it has errors of many kinds."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{name}: gs:// takes `pip install gcsfs` ({error})") from error
    except Exception as error:
        raise UserError(f"{name} cannot be reached: {' '.join(str(error).split())[:300]}") from error
