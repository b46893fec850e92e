"""Checks the fields of the errors that tests expect; tests/golden/messages.txt has their wording."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from mmfusion.errors import UserError


@contextlib.contextmanager
def rejects(
    path: str | Path, value: Any = ANY, suggests: str = "", says: object = ""
) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expects a UserError of one line, and yields what `pytest.raises` does.

    Args:
      path: its path: a config key, a flag, a file or a folder.
      value: its value, of the same type; None: the message has it.
      suggests: one of its choices, which the line names.
      says: a fact that its message contains, such as a count.
    """
    with pytest.raises(UserError) as raised:
        yield raised
    error = raised.value
    assert error.path == str(path), error
    assert value is ANY or repr(error.value) == repr(value), error
    assert not suggests or (suggests in error.choices and suggests in str(error)), error
    assert str(says) in error.message and "\n" not in str(error), error
