"""Decodes chunks of splits in several processes: this one, and `python -m mmfusion.data.decode_worker`.

The processes are not those of `multiprocessing`, which would run a user's script again in each of them and which a
daemonic process, such as that of an ablation's trial, must not start.
"""

import collections
import contextlib
import ctypes
import dataclasses
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from mmfusion.data.decoded_files import Chunk

DONE, FAILED = b"\1", b"\0"  # a worker's answers
PR_SET_PDEATHSIG = 1
THREADS = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def decode_chunks(chunks: Sequence[Chunk], processes: int, advance: Callable[[Chunk], None]) -> None:
    """Decodes chunks, in order as far as several processes allow.

    What a worker cannot do is done by this process, which raises the errors of the first rows that have any.

    Args:
      chunks: the chunks.
      processes: the number of processes that decode, with this one.
      advance: called after each chunk, in any thread.

    Raises:
      UserError: a target cannot be read, or a prepared dataset is corrupt.
      OSError: the files cannot be written.
    """
    pending, left = collections.deque(enumerate(chunks)), []
    with _workers(processes - 1) as workers:
        threads = [
            threading.Thread(target=_feed, args=(worker, pending, left, advance), daemon=True) for worker in workers
        ]
        for thread in threads:
            thread.start()
        for number, chunk in _pop(pending):
            try:
                chunk.decode()
            except Exception:  # raised again below, unless an earlier chunk has an error
                left += [(number, chunk), *_pop(pending)]
            else:
                advance(chunk)
        for thread in threads:
            thread.join()
        for _, chunk in sorted(left, key=lambda item: item[0]):
            chunk.decode()
            advance(chunk)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[list[subprocess.Popen]]:
    environment = {**os.environ, **THREADS, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "mmfusion.data.decode_worker"]
    workers = [
        # In a session of its own, Ctrl-C reaches this process alone.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def _pop(pending: collections.deque) -> Iterator[tuple[int, Chunk]]:
    with contextlib.suppress(IndexError):
        while True:
            yield pending.popleft()


def _feed(worker: Any, pending: collections.deque, left: list, advance: Callable[[Chunk], None]) -> None:
    """Has chunks decoded by a worker; those it cannot decode, and after an error all others, are added to `left`."""
    for item in _pop(pending):
        answer = b""
        with contextlib.suppress(Exception):  # the worker has died, or the rows cannot be sent
            _send(item[1], worker.stdin)
            answer = worker.stdout.read(1)
        if answer == DONE:
            advance(item[1])
            continue
        left.append(item)
        if answer == FAILED:
            left += _pop(pending)
        return


def _send(chunk: Chunk, stream: IO[bytes]) -> None:
    """Sends a chunk; its reader and rows as bytes, which the worker unpickles only once where they are the same."""
    split = chunk.split
    rows = getattr(split.source, "part", None)
    shared = [pickle.dumps(part) for part in (split.reader, rows(split.ids.tolist()) if rows else split.source)]
    bare = dataclasses.replace(split, reader=None, source=None)  # pyright: ignore[reportArgumentType]
    pickle.dump((dataclasses.replace(chunk, split=bare), shared), stream)
    stream.flush()


def main() -> None:
    """Decodes the chunks that standard input has, and answers with a byte for each; ends with its parent process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    loads = functools.lru_cache(maxsize=8)(pickle.loads)
    with contextlib.suppress(EOFError):
        while True:
            chunk, shared = pickle.load(sys.stdin.buffer)
            try:
                reader, source = map(loads, shared)
                split = dataclasses.replace(chunk.split, reader=reader, source=source)
                dataclasses.replace(chunk, split=split).decode()
            except Exception:  # the other process meets it, too, and reports it
                answers.write(FAILED)
            else:
                answers.write(DONE)


if __name__ == "__main__":
    main()
