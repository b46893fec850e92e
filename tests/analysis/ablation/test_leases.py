"""Leases on trials: in a folder, in memory, and in an emulated bucket with its real client library."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfusion.analysis.ablation import leases
from mmfusion.analysis.ablation.leases import LeaseLost, Leases, Unshared
from tests.errors import rejects
from tests.storage import asked_by_clients, serving


@pytest.fixture(scope="module")
def storage() -> Iterator[None]:
    """Buckets at an emulator."""
    with serving() as address, asked_by_clients(address):
        yield


def empty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empties the file system in memory, and makes its exclusive creation safe for threads."""
    lock, pipe_file = threading.Lock(), MemoryFileSystem.pipe_file

    def locked(self: MemoryFileSystem, *args: Any, **options: Any) -> None:
        with lock:
            pipe_file(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", locked)


@pytest.fixture(params=["folder", "memory", "gs"])
def place(request: pytest.FixtureRequest, storage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An ablation's directory: in a folder, or in a bucket."""
    empty_memory(monkeypatch)
    bucket = f"bucket/{tmp_path.name}"
    return str(tmp_path / "ab l#1") if request.param == "folder" else f"{request.param}://{bucket}"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Leases]]:
    """`start(place)` -> the leases of a new worker, which renews when a test says so, and is ended at the end."""
    monkeypatch.setattr(leases, "RENEW", 3600.0)
    started: list[Leases] = []

    def start(place: str) -> Leases:
        started.append(Leases(place).__enter__())
        return started[-1]

    yield start
    for worker in started:
        worker.__exit__()


def files(worker: Leases) -> list[str]:
    """Returns the names of all files of leases."""
    return sorted(f"{key}.{number}" for key, number in worker._newest().items())


def test_leases_are_held_by_one_worker(place, start):
    first, second = start(place), start(place)
    assert first.take([["a"]]) == ["a"]
    assert second.take([["a"]]) == [] and second.take([["a"], ["c"]]) == ["c"]
    assert second.take([["a", "b"]]) == ["b"]  # what is free of a group
    first.renew()
    assert files(first) == ["a.2", "b.1", "c.1"]
    first.release(["a", "b"])  # of b it has none
    assert files(first) == ["b.1", "c.1"]
    assert second.take([["a"]]) == ["a"] and first.take([["a"], ["b"]]) == []
    first.check()
    second.check()
    second.__exit__()
    assert files(first) == []


def test_leases_that_are_not_renewed_are_taken_over(place, start):
    paused, other, third = start(place), start(place), start(place)
    assert paused.take([["a"], ["b"]]) == ["a"]
    other._clock += leases.STALE - 10  # as if that time had passed
    assert other.take([["a"]]) == []
    other._clock += 20
    assert other.take([["a"]]) == ["a"]
    assert third.take([["a"]]) == []  # a lease that was taken over is as good as new
    paused.check()  # not noticed yet
    paused.renew()
    with pytest.raises(LeaseLost, match=r"lease of a .*run the same command again"):
        paused.check()
    paused.release(["a"])  # it has none
    other.renew()
    other.check()
    assert files(other) == ["a.3"]


def test_renewed_lease_is_as_good_as_new(place, start):
    holder, other = start(place), start(place)
    assert holder.take([["a"]])
    before = other._files.modified(f"{other._root}/a.1")
    time.sleep(0.02)
    holder.renew()
    assert other._files.modified(f"{other._root}/a.2") > before
    assert other._now() - before.timestamp() < leases.GIVE_UP  # by the clock of the place, not of the time zone


def test_lease_is_lost_though_its_next_holder_released_it(place, start, monkeypatch):
    paused, other = start(place), start(place)
    assert paused.take([["a"]])
    monkeypatch.setattr(leases, "STALE", -1.0)
    assert other.take([["a"]])
    other.release(["a"])
    assert files(other) == []
    paused.renew()
    with pytest.raises(LeaseLost):
        paused.check()


def test_lease_is_not_taken_by_a_worker_whose_listing_is_old(place, start, monkeypatch):
    holder, late = start(place), start(place)
    assert holder.take([["a"]])
    for _ in range(3):
        holder.renew()
    real, stale = late._newest, [{}, {"a": 1}]
    monkeypatch.setattr(late, "_newest", lambda: stale.pop() if stale else real())
    monkeypatch.setattr(late, "_is_free", lambda path: True)
    assert late.take([["a"]]) == []  # creates a.2, which is past
    stale = [{}]
    monkeypatch.setattr(late, "_newest", lambda: stale.pop() if stale else real())
    assert late.take([["a"]]) == []  # creates a.1
    holder.renew()
    holder.check()
    assert files(holder) == ["a.5"]


def test_lease_of_a_worker_killed_on_this_machine_is_free_at_once(place, start):
    killed, other = start(place), start(place)
    assert killed.take([["a"]])
    assert other.take([["a"]]) == []
    killed._alive.close()  # as the kernel does
    assert other.take([["a"]]) == ["a"]


def test_lease_is_kept_through_errors_of_the_storage_for_a_while(place, start, monkeypatch):
    worker = start(place)
    assert worker.take([["a"]])
    listing = worker._newest
    with monkeypatch.context() as patch:  # the answer to a renewal is lost, and then the storage for a while
        answers = iter([listing])
        patch.setattr(worker, "_newest", lambda: next(answers, _unreachable)())
        for _ in range(2):
            with pytest.raises(OSError, match="unreachable"):
                worker.renew()
        worker.check()
        patch.setattr(leases, "GIVE_UP", -1.0)
        with pytest.raises(LeaseLost):
            worker.check()
    worker.renew()
    worker.check()
    assert files(worker) == ["a.2"]


def _unreachable():
    raise OSError("unreachable")


def test_leases_of_many_workers_at_once_are_each_taken_once(place, start):
    workers, taken = [start(place) for _ in range(4)], []
    names = [[f"trial_{i}"] for i in range(12)]

    def work(worker: Leases) -> None:
        while names_taken := worker.take(names):
            taken.extend(names_taken)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(name for (name,) in names)


def test_leases_are_renewed_by_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "RENEW", 0.02)
    with Leases(tmp_path) as worker:
        assert worker.take([["a"]])
        deadline = time.monotonic() + 20
        while files(worker)[0] < "a.4" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert files(worker)[0] >= "a.4"
    assert list((tmp_path / leases.FOLDER).iterdir()) == []


def test_leases_have_names_of_any_length(tmp_path, start):
    worker = start(str(tmp_path))
    names = ["x" * 253 + end for end in ("a", "b")]
    assert [worker.take([[name]]) for name in names] == [[name] for name in names]
    assert max(len(name) for name in os.listdir(tmp_path / leases.FOLDER)) < 255


def test_leases_reject_unreachable_buckets():
    with rejects("nowhere://bucket", None, says="Protocol not known"):
        Leases("nowhere://bucket")


def test_holding_waits_for_a_lease(place, start, monkeypatch):
    first, second = start(place), start(place)
    monkeypatch.setattr(leases, "POLL", 0.01)
    order = []

    def wait() -> None:
        with second.holding("report"):
            order.append("second")

    with first.holding("report"):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and files(first) == []


def test_unshared_takes_without_files():
    taking = Unshared()
    with taking.holding("report"):
        assert taking.take([["a", "b"], ["c"]]) == ["a", "b"] and taking.take([]) == []
    taking.release(["a"])
    taking.check()
