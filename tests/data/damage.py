"""Random damage of files, for tests of what is read from them."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

FEW = settings(database=None, deadline=None, derandomize=True, max_examples=100)
MANY = settings(FEW, max_examples=1000)  # in thorough tests

POSITIONS = st.integers(0, 2**20)  # taken modulo the length
BYTES = st.binary(min_size=1, max_size=8)
SIZES = st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\1\0", b"\x80\0\0\0"])


def _at(position: int, data: bytes) -> int:
    return position % max(1, len(data))


def _flip(position: int, bit: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        i = _at(position, data)
        return data[:i] + bytes(byte ^ 1 << bit for byte in data[i : i + 1]) + data[i + 1 :]

    return change


def _overwrite(position: int, content: bytes, within: int) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        i = _at(position, data[:within])
        return data[:i] + content + data[i + len(content) :]

    return change


def _cut(position: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: _at(position, data)]


def _insert(position: int, content: bytes, repeat: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: _at(position, data)] + content * repeat + data[_at(position, data) :]


def _remove(position: int, size: int) -> Callable[[bytes], bytes]:
    return lambda data: data[: _at(position, data)] + data[_at(position, data) + size :]


CUTS = st.builds(_cut, POSITIONS)
FLIPS = st.builds(_flip, POSITIONS, st.integers(0, 7))
CHANGES = st.one_of(
    FLIPS,
    CUTS,
    st.builds(_overwrite, POSITIONS, BYTES | SIZES, st.just(80)),  # in a header
    st.builds(_overwrite, POSITIONS, BYTES | SIZES, st.just(2**20)),
    st.builds(_insert, POSITIONS, BYTES, st.sampled_from([1, 16])),
    st.builds(_remove, POSITIONS, st.integers(1, 64)),
)
DAMAGE = st.lists(CHANGES, min_size=1, max_size=4)


def few_and_many(check: Callable[..., None], *strategies: st.SearchStrategy) -> tuple[Callable, Callable]:
    """Returns a check with a few random arguments, and with as many as a thorough test has."""
    return FEW(given(*strategies)(check)), MANY(given(*strategies)(check))


def damaged(data: bytes, changes: list[Callable[[bytes], bytes]]) -> bytes:
    """Returns a file after the changes, in their order."""
    for change in changes:
        data = change(data)
    return data


def is_short_line(error: BaseException) -> bool:
    """Returns whether an error's text is one line, as it is shown with a row."""
    return 0 < len(str(error)) <= 250 and "\n" not in str(error)
