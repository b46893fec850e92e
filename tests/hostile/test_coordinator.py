"""Processes of `--distributed=HOST:PORT,PROCESS,PROCESSES` that must not be let in: a line, and the others go on."""

import contextlib
import socket
import threading
import time

import pytest
from jax._src.lib import _jax

from mmfusion.distributed import hosts, rendezvous
from tests.errors import rejects


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    for name in ("RESOLVE_SECONDS", "REACH_SECONDS", "ANSWER_SECONDS"):
        monkeypatch.setattr(rendezvous, name, 0.5)
    monkeypatch.setattr(rendezvous, "ALL_SECONDS", 10.0)


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def flag(port, process, processes):
    return f"localhost:{port},{process},{processes}"


class Meeting(threading.Thread):
    """A process that meets the others, in a thread."""

    def __init__(self, text):
        super().__init__(daemon=True)
        self.place, self.error = rendezvous.parse(text), None
        self.start()

    def run(self):
        try:
            rendezvous.meet(self.place)
        except Exception as error:
            self.error = error

    def succeeds(self):
        self.join(5)
        assert not self.is_alive() and self.error is None, (self.place, self.error)
        return True


def wait_for(port):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", port), 1).close()
            return
        time.sleep(0.01)


def test_processes_meet_in_any_order(port):
    later = [Meeting(flag(port, process, 3)) for process in (2, 1)]
    time.sleep(0.1)
    assert all(process.succeeds() for process in (Meeting(flag(port, 0, 3)), *later))
    assert Meeting(flag(port, 0, 1)).succeeds()


def test_second_process_with_an_index_is_refused_and_the_first_goes_on(port):
    first = Meeting(flag(port, 0, 3))
    wait_for(port)
    second = Meeting(flag(port, 1, 3))
    time.sleep(0.3)
    with rejects("--distributed", flag(port, 1, 3), says="another process has index 1"):
        rendezvous.meet(rendezvous.parse(flag(port, 1, 3)))
    with rejects("--distributed", flag(port, 0, 3), says="in use, maybe by another process 0"):
        rendezvous.meet(rendezvous.parse(flag(port, 0, 3)))
    with rejects("--distributed", flag(port, 2, 4), says="process 0 has 3 processes and process 2 has 4"):
        rendezvous.meet(rendezvous.parse(flag(port, 2, 4)))
    assert all(process.succeeds() for process in (Meeting(flag(port, 2, 3)), first, second))


def test_process_that_was_killed_while_it_waited_may_come_again(port):
    first = Meeting(flag(port, 0, 3))
    wait_for(port)
    with socket.create_connection(("localhost", port)) as killed:
        killed.sendall(b"mmfusion process 1 of 3\n")
        assert killed.recv(100) == rendezvous.WAIT
    second = Meeting(flag(port, 2, 3))
    time.sleep(0.2)  # now process 0 has heard from all, and one of them is gone
    assert all(process.succeeds() for process in (Meeting(flag(port, 1, 3)), first, second))


def test_late_process_is_refused_by_a_run_that_is_connected(port):
    """JAX's own coordinator aborts all processes of a run where a second one connects with an index of theirs."""
    service = _jax.get_distributed_runtime_service(f"[::]:{port}", 2, heartbeat_timeout=10, shutdown_timeout=1)
    try:
        for process, says in ((0, "in use"), (1, "one of them with this index")):
            with rejects("--distributed", flag(port, process, 2), says=says):
                hosts.initialize(flag(port, process, 2))
    finally:
        service.shutdown()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "talks"])
def test_port_of_another_program_is_refused(port, answer):
    with socket.create_server(("", port)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    connection.sendall(answer)
                    kept.append(connection)

        kept = []
        threading.Thread(target=serve, daemon=True).start()
        for process in (0, 1):
            began = time.monotonic()
            with rejects("--distributed", flag(port, process, 2), says="in use"):
                hosts.initialize(flag(port, process, 2))
            assert time.monotonic() - began < 2
        for connection in kept:
            connection.close()


def test_port_that_is_bound_is_refused(port):
    with socket.socket() as bound:
        bound.bind(("", port))
        with rejects("--distributed", flag(port, 0, 2), says="in use"):
            hosts.initialize(flag(port, 0, 2))


def test_processes_that_do_not_come_are_named(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "ALL_SECONDS", 0.3)
    with rejects("--distributed", flag(port, 0, 3), says="processes 1, 2 did not come"):
        hosts.initialize(flag(port, 0, 3))
    with rejects("--distributed", flag(port, 1, 3), says="process 0 was not at"):
        hosts.initialize(flag(port, 1, 3))


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b", "x" * 70, "-"])
@pytest.mark.parametrize("process", [0, 1])
def test_host_that_does_not_exist_is_refused(host, process):
    began = time.monotonic()
    with rejects("--distributed", f"{host}:1234,{process},2", says=f"there is no host {host}"):
        hosts.initialize(f"{host}:1234,{process},2")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("localhost:0,0,2", "no port 0"),
        ("localhost:99999,0,2", "no port 99999"),
        ("localhost:-1,0,2", "HOST:PORT,PROCESS,PROCESSES"),
        ("localhost:http,0,2", "HOST:PORT,PROCESS,PROCESSES"),
        ("localhost:²,0,2", "HOST:PORT,PROCESS,PROCESSES"),
        ("localhost,0,2", "HOST:PORT,PROCESS,PROCESSES"),
        (":1234,0,2", "HOST:PORT,PROCESS,PROCESSES"),
        ("localhost:1234,2,2", "no process 2"),
        ("localhost:1234,0,0", "no process 0"),
        ("localhost:1234,0,999999999", "no process 0"),
    ],
)
def test_address_that_cannot_be_is_refused(text, says):
    with rejects("--distributed", text, says=says):
        hosts.initialize(text)
