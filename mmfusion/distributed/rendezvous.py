"""How the processes of `--distributed=HOST:PORT,PROCESS,PROCESSES` find each other, before JAX connects them.

JAX aborts a whole run when a second process connects with the index of another, lets two coordinators share a port, and
tries for five minutes to reach a host that does not exist. The processes therefore meet at the same port beforehand:
process 0 listens there until all others have sent their index, answers each at once, and then lets all of them go on.
A process that is refused or comes late ends with the reason.
"""

import contextlib
import dataclasses
import errno
import re
import socket
import threading
import time
from typing import NoReturn

from mmfusion.errors import UserError

FLAG = "--distributed"
MAX_PROCESSES = 100_000
RESOLVE_SECONDS, REACH_SECONDS, ANSWER_SECONDS = 5.0, 2.0, 4.0  # to look up, reach and hear from the coordinator's host
ALL_SECONDS = 300.0  # until all processes are there, as JAX allows
RETRY_SECONDS = 0.2
HELLO, WAIT, GO, REFUSED = "mmfusion process", b"mmfusion wait\n", b"mmfusion go\n", b"mmfusion refused: "
MAX_LINE = 200  # bytes


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of a run: `text` is the flag's value, and `host:port` that of process 0."""

    text: str
    host: str
    port: int
    process: int
    processes: int


def parse(text: str) -> Place:
    """Returns the place that `HOST:PORT,PROCESS,PROCESSES` names; raises UserError where it is no such text."""
    match = re.fullmatch(r"([^\s,/]+):(\d{1,9}),(\d{1,9}),(\d{1,9})", text, re.ASCII)
    if match is None:
        _refuse(text, "expected auto or HOST:PORT,PROCESS,PROCESSES")
    place = Place(text, match[1], *map(int, match.groups()[1:]))
    if not 0 < place.port < 2**16:
        _refuse(text, f"there is no port {place.port}: give one from 1 to 65535")
    if not 0 < place.processes <= MAX_PROCESSES or place.process >= place.processes:
        _refuse(text, f"of {place.processes} processes there is no process {place.process}: they are numbered from 0")
    return place


def meet(place: Place) -> None:
    """Waits until all processes are there.

    Raises:
      UserError: the host is unknown, the port is in use or not allowed, another process has this index, the processes
        do not agree on their number, or some have not come after five minutes.
    """
    _look_up(place)
    if place.process:
        _join(place)
    else:
        _gather(place)


def _refuse(text: str, message: str) -> NoReturn:
    raise UserError(message, path=FLAG, value=text)


def _look_up(place: Place) -> None:
    """Looks up the host's name, as often as it fails in a few seconds: a cluster may publish it only now."""
    reasons = ["the name server does not answer"]
    done = threading.Event()

    def look_up() -> None:
        while not done.is_set():
            try:
                socket.getaddrinfo(place.host.strip("[]"), place.port, type=socket.SOCK_STREAM)
                reasons.clear()
                done.set()
            except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is empty or too long
                reasons[:] = [getattr(error, "strerror", None) or str(error)]
                if isinstance(error, UnicodeError):
                    done.set()
                done.wait(RETRY_SECONDS)

    threading.Thread(target=look_up, daemon=True).start()  # a name server that does not answer takes minutes
    done.wait(RESOLVE_SECONDS)
    done.set()
    if reasons:
        _refuse(place.text, f"there is no host {place.host} ({reasons[0]})")


def _reach(place: Place, seconds: float) -> socket.socket:
    return socket.create_connection((place.host.strip("[]"), place.port), timeout=seconds)


def _gather(place: Place) -> None:
    """Listens as process 0 until all others are there."""
    in_use = f"port {place.port} of {place.host} is in use, maybe by another process 0: give another port"
    with contextlib.suppress(OSError), _reach(place, REACH_SECONDS):
        _refuse(place.text, in_use)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", place.port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        reason = in_use if error.errno == errno.EADDRINUSE else f"cannot listen on port {place.port}: {error.strerror}"
        raise UserError(reason, path=FLAG, value=place.text) from error
    deadline, present = time.monotonic() + ALL_SECONDS, {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        while len(present) < place.processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                absent = [str(i) for i in range(1, place.processes) if i not in present]
                more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
                message = f"processes {', '.join(absent[:10])}{more} did not come within {ALL_SECONDS:.0f} seconds"
                _refuse(place.text, message)
            stack.enter_context(connection)
            with contextlib.suppress(OSError):
                connection.settimeout(ANSWER_SECONDS)
                if index := _admit(place, connection, present):
                    present[index] = connection
            if len(present) == place.processes - 1:  # a process that was killed while it waited has to come again
                present = {index: waiting for index, waiting in present.items() if not _has_left(waiting)}
        for connection in present.values():
            with contextlib.suppress(OSError):  # it has ended; JAX will say so
                connection.sendall(GO)


def _admit(place: Place, connection: socket.socket, present: dict[int, socket.socket]) -> int:
    """Answers a process that has come; returns its index, 0 of one that is refused."""
    match = re.fullmatch(rf"{HELLO} (\d{{1,9}}) of (\d{{1,9}})\n", _line(connection).decode(errors="replace"))
    if match is None or int(match[1]) >= int(match[2]):  # something else on the network
        connection.close()
        return 0
    index, processes = int(match[1]), int(match[2])
    if processes != place.processes:
        message = f"process 0 has {place.processes} processes and process {index} has {processes}"
    elif index == 0 or (index in present and not _has_left(present[index])):
        message = f"another process has index {index}: give each process its own"
    else:
        connection.sendall(WAIT)
        return index
    connection.sendall(REFUSED + f"{message}\n".encode())
    connection.close()
    return 0


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(ANSWER_SECONDS)


def _join(place: Place) -> None:
    """Joins process 0, as often as it is not there yet."""
    deadline, silent = time.monotonic() + ALL_SECONDS, None  # since when the port takes connections without an answer
    while time.monotonic() < deadline:
        try:
            connection = _reach(place, ANSWER_SECONDS)
        except OSError:
            silent = None
            time.sleep(RETRY_SECONDS)
            continue
        silent = silent or time.monotonic()
        with connection:
            answer = _ask(place, connection, deadline)
        if answer == GO:
            return
        if answer.startswith(REFUSED):
            _refuse(place.text, answer.removeprefix(REFUSED).decode(errors="replace").strip())
        if answer == WAIT:  # process 0 has ended; it may be started again
            silent = None
        elif answer or time.monotonic() - silent >= ANSWER_SECONDS:
            message = f"at {place.host}:{place.port} no process 0 waits for process {place.process}: the port is in use"
            _refuse(place.text, f"{message}, or that run has all of its processes, one of them with this index")
        time.sleep(RETRY_SECONDS)
    _refuse(place.text, f"process 0 was not at {place.host}:{place.port} within {ALL_SECONDS:.0f} seconds")


def _ask(place: Place, connection: socket.socket, deadline: float) -> bytes:
    """Returns the last line that process 0 answers with; empty where nothing like it does."""
    answer = b""
    with contextlib.suppress(OSError):
        connection.settimeout(ANSWER_SECONDS)
        connection.sendall(f"{HELLO} {place.process} of {place.processes}\n".encode())
        answer = _line(connection)
        if answer == WAIT:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            answer = _line(connection) or WAIT
    return answer


def _line(connection: socket.socket) -> bytes:
    """Returns what a connection sends up to the end of a line, at most `MAX_LINE` bytes."""
    line = b""
    while len(line) < MAX_LINE and not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            break
        line += byte
    return line
