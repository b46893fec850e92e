"""Trials given to executors: several workers that share a folder or a bucket, and workers that are lost."""

import functools
import json
import threading
import time
import types
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfusion.analysis import outcome as outcomes
from mmfusion.analysis.ablation import leases, plan, runner, scheduling
from mmfusion.analysis.ablation.leases import LeaseLost, Leases, Unshared
from mmfusion.analysis.ablation.remote_copy import RemoteCopy
from mmfusion.analysis.ablation.runner import InProcess, Stage
from tests.analysis.ablation.test_ablation import do_nothing, make, result
from tests.analysis.ablation.test_leases import empty_memory


class Died(BaseException):
    """Ends a worker in the middle of a trial, without any of its clean-up."""


@pytest.fixture
def quick(monkeypatch):
    """Leases that are renewed in fractions of a second, and are free by their age alone, also on this machine."""
    monkeypatch.setattr(leases, "RENEW", 0.05)
    monkeypatch.setattr(leases, "POLL", 0.02)
    monkeypatch.setattr(leases, "_has_ended", lambda worker: False)


@pytest.fixture
def planned():
    return plan.build(make, ["gmu", "concat"], 2, {})


def write_result(trial, folder, ran, dies_at="", fails_at=()):
    """A stage that writes a result which depends on the trial, after a while; one that dies leaves a part of it."""
    ran.append(trial.name)
    if trial.name == dies_at:
        (folder / "checkpoint").touch()
        raise Died
    time.sleep(0.03)
    if trial.name in fails_at:
        raise ValueError("no such data")
    content = result("same")
    content["test"]["accuracy"] = int.from_bytes(trial.name.encode()) % 997 / 997
    (folder / runner.RESULT).write_text(json.dumps(content))


def stage(ran, **options):
    return Stage(functools.partial(write_result, ran=ran, **options), runner.RESULT)


def work(trials, directory, stage, taking, url="", begin=do_nothing):
    """Runs a stage as a worker does, once `begin` has returned, and returns its events."""
    events = scheduling.run(trials, stage, directory, InProcess(directory), taking, RemoteCopy(url, directory))
    begin()
    return dict_of(events)


def dict_of(events):
    return {trial.name: error for trial, error in events}


def table(planned, directory: Path) -> bytes:
    outcomes.conclude(planned, directory, "accuracy", [], {}, {})
    return (directory / "runs.csv").read_bytes()


@pytest.fixture
def alone(planned, tmp_path):
    """The table of one worker."""
    work(planned.trials, tmp_path / "alone", stage([]), Unshared())
    return table(planned, tmp_path / "alone")


@pytest.mark.parametrize("in_bucket", [False, True])
def test_two_workers_run_each_trial_once(in_bucket, planned, alone, quick, tmp_path, monkeypatch):
    empty_memory(monkeypatch)
    url = "memory://bucket/ablation" if in_bucket else ""
    folders = [tmp_path / ("one" if in_bucket and i else "both") for i in range(2)]
    ran, events, barrier = [[], []], [{}, {}], threading.Barrier(2)

    def worker(i: int) -> None:
        with Leases(url or folders[i]) as own:
            events[i] = work(planned.trials, folders[i], stage(ran[i]), own, url, barrier.wait)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ran[0] + ran[1]) == sorted(trial.name for trial in planned.trials)
    assert len(ran[0]) > 1 and len(ran[1]) > 1
    assert events[0] == events[1] == {trial.name: "" for trial in planned.trials}  # both show all trials
    assert table(planned, folders[0]) == table(planned, folders[1]) == alone
    if in_bucket:
        names = [name.partition("ablation/")[2] for name in MemoryFileSystem.store]
        assert sorted(names) == sorted(f"trials/{trial.name}/{name}" for trial in planned.trials
                                       for name in (runner.RESULT, runner.LOG))  # fmt: skip


def test_a_worker_that_dies_costs_its_trial(planned, alone, quick, tmp_path, monkeypatch):
    lost = planned.trials[2].name
    dead = Leases(tmp_path).__enter__()
    ran_by_dead, ran = [], []
    with pytest.raises(Died):
        work(planned.trials, tmp_path, stage(ran_by_dead, dies_at=lost), dead)
    dead._ended.set()
    dead._thread.join()
    waits = []
    with Leases(tmp_path) as alive:

        def wait(seconds):
            waits.append(len(ran))
            alive._clock += 40  # as if it had waited that long

        monkeypatch.setattr(scheduling, "time", types.SimpleNamespace(sleep=wait))
        events = work(planned.trials, tmp_path, stage(ran), alive)
    assert waits == [len(planned.trials) - 3] * 3  # after all others it waited until the lease was 90 s old
    assert ran_by_dead == [trial.name for trial in planned.trials[:3]]
    assert ran == [trial.name for trial in planned.trials[3:]] + [lost]
    assert set(events) == {trial.name for trial in planned.trials[2:]}
    assert table(planned, tmp_path) == alone
    dead._alive.close()
    leases._lock_path(dead._worker).unlink()


def test_a_worker_that_loses_its_lease_stops(planned, quick, tmp_path):
    first, other = planned.trials[:2]
    with Leases(tmp_path) as paused, Leases(tmp_path) as taker:

        def take_over(trial, folder):
            paused._ended.set()  # as if its machine were suspended
            paused._thread.join()
            taker._clock += 2 * leases.STALE
            assert taker.take([[trial.name]])
            paused.renew()
            (folder / runner.RESULT).write_text("{}")

        with pytest.raises(LeaseLost, match=first.name):
            work([first, other], tmp_path, Stage(take_over, runner.RESULT), paused)
    assert not runner.trial_directory(tmp_path, other).exists()


def test_trials_that_end_elsewhere_are_shown_meanwhile(planned, tmp_path):
    first, second, third = planned.trials[:3]

    def end_two(trial, folder):
        for ended in (trial, third):
            runner.trial_directory(tmp_path, ended).mkdir(parents=True, exist_ok=True)
            (runner.trial_directory(tmp_path, ended) / runner.RESULT).touch()

    events = work([first, second, third], tmp_path, Stage(end_two, runner.RESULT), Unshared())
    assert list(events) == [first.name, third.name, second.name]


def test_failed_trials_are_run_again_once_by_each_worker_that_starts_later(planned, quick, tmp_path):
    name = planned.trials[1].name
    ran: list[str] = []
    failing = stage(ran, fails_at=[name])
    error = "ValueError: no such data"
    with Leases(tmp_path) as own:
        assert work(planned.trials, tmp_path, failing, own)[name] == error
        assert ran.count(name) == 1
        shared, executor = RemoteCopy("", tmp_path), InProcess(tmp_path)
        started_before = scheduling.run(planned.trials, failing, tmp_path, executor, own, shared)
        assert work(planned.trials, tmp_path, failing, own) == {name: error}
        assert dict_of(started_before) == {name: error}  # another worker has run it again meanwhile
        assert ran.count(name) == 2
        assert work(planned.trials, tmp_path, stage(ran), own) == {name: ""}
    assert not (runner.trial_directory(tmp_path, planned.trials[1]) / runner.FAILED).exists()


def start_and_sleep(trial, folder):
    (folder / "started").touch()
    time.sleep(600)


@pytest.mark.process
def test_pool_kills_its_processes_when_a_lease_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.05)
    (trial,) = trials = [types.SimpleNamespace(name="a")]

    def check():
        if (runner.trial_directory(tmp_path, trial) / "started").exists():
            raise LeaseLost("lost")

    batches = iter([trials])
    with pytest.raises(LeaseLost), runner.Pool(tmp_path, 2, do_nothing) as pool:
        list(pool.run(lambda: next(batches, []), Stage(start_and_sleep, runner.RESULT), check))
    assert [worker._process.exitcode for worker in pool._workers] == [-9]
