"""An ablation in a bucket: a stand-in for its file system, and machines that see nothing but what is in it."""

import json
import sys
from types import SimpleNamespace

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.remote_copy import Mirror, local
from mmfusion.errors import UserError

BUCKET = "memory://bucket/ablation"
PLAN = '{"code": "1", "cells": []}'


@pytest.fixture
def sent(monkeypatch):
    """The names of the files that are sent, in order, to a bucket that is empty at first."""
    names, put = [], MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda self, here, there: (names.append(there), put(self, here, there))
    )
    return names


def cells(*names):
    return [SimpleNamespace(name=name) for name in names]


def end(directory, cell, **files):
    """Leaves files in a cell's folder, and its checkpoint."""
    folder = runner.cell_directory(directory, cell)
    for name in ("checkpoints/4/array", "summary", runner.LOCK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0numbers")
    for name, said in files.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    return cell, ""


def test_machines_share_what_is_finished(sent, tmp_path):
    a, b, c = plan = cells("a_seed=0", "b_seed=0", "c_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = Mirror(BUCKET, one), Mirror(BUCKET, two)
    first.fetch(plan)  # there is nothing yet
    one.mkdir()
    (one / "plan.json").write_text(PLAN)
    first.send()
    second.fetch(plan)
    assert (two / "plan.json").read_text() == PLAN

    end(one, b)  # under way
    done = first.sending(iter([end(one, a, result={"loss": 1.0})]))
    assert list(done) == [(a, "")]
    assert len(sent) == 4 and sent[-1].endswith("a_seed=0/result.json")  # who sees the result sees the rest
    list(second.sending(iter([end(two, c, result={"loss": 2.0})])))
    second.fetch(plan)
    assert runner.is_done(two, a) and not runner.cell_directory(two, b).exists()
    copied = runner.cell_directory(two, a)
    assert (copied / "checkpoints" / "4" / "array").read_bytes() == b"\0numbers"
    assert not (copied / runner.LOCK).exists()
    first.fetch(plan)
    assert runner.is_done(one, c) and not runner.is_done(one, b)


def test_what_was_not_sent_when_it_ended_is_sent_later(sent, tmp_path):
    (cell,) = plan = cells("a_seed=0")
    end(tmp_path / "one", cell, result={"loss": 1.0})  # and then the machine was lost
    Mirror(BUCKET, tmp_path / "one").fetch(plan)
    Mirror(BUCKET, tmp_path / "two").fetch(plan)
    assert runner.is_done(tmp_path / "two", cell)


def test_a_copy_of_another_plan_is_dropped(sent, tmp_path):
    (cell,) = plan = cells("a_seed=0")
    old = {"code": "1", "cells": [{"name": "a_seed=0", "config": 1}]}
    for directory, code in (("one", "1"), ("two", "2")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "plan.json").write_text(json.dumps({**old, "code": code}))
    end(tmp_path / "one", cell, result={"loss": 1.0})
    Mirror(BUCKET, tmp_path / "two").send()  # the bucket was begun anew, by another machine and with other code
    Mirror(BUCKET, tmp_path / "one").fetch(plan)
    assert not runner.is_done(tmp_path / "one", cell)
    assert json.loads((tmp_path / "one" / "plan.json").read_text())["code"] == "2"

    grown = {"code": "2", "cells": [*old["cells"], {"name": "b_seed=0", "config": 1}]}
    (tmp_path / "two" / "plan.json").write_text(json.dumps(grown))
    Mirror(BUCKET, tmp_path / "two").send()
    end(tmp_path / "one", cell, result={"loss": 1.0})
    Mirror(BUCKET, tmp_path / "one").fetch(plan)
    assert runner.is_done(tmp_path / "one", cell)


def test_what_is_finished_here_is_not_replaced(sent, tmp_path):
    (cell,) = plan = cells("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    list(Mirror(BUCKET, one).sending(iter([(end(one, cell, failed={"error": "no data"})[0], "no data")])))
    end(two, cell, result={"loss": 1.0})
    Mirror(BUCKET, two).fetch(plan)
    assert not (runner.cell_directory(two, cell) / runner.FAILED).exists()


def test_a_failure_is_told_and_its_end_too(sent, tmp_path):
    (cell,) = plan = cells("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = Mirror(BUCKET, one), Mirror(BUCKET, two)
    end(one, cell, failed={"error": "no data"})
    list(first.sending(iter([(cell, "no data")])))
    second.fetch(plan)
    assert json.loads((runner.cell_directory(two, cell) / runner.FAILED).read_text()) == {"error": "no data"}

    (runner.cell_directory(one, cell) / runner.FAILED).unlink()
    list(first.sending(iter([end(one, cell, result={"loss": 1.0})])))
    assert not MemoryFileSystem().exists(f"{BUCKET}/cells/{cell.name}/{runner.FAILED}")
    second.fetch(plan)
    assert runner.is_done(two, cell)


def test_a_local_directory_has_no_copy(tmp_path):
    assert local(str(tmp_path), tmp_path / "copies") == (tmp_path, "")
    (cell,) = plan = cells("a_seed=0")
    mirror = Mirror("", tmp_path)
    mirror.fetch(plan)
    mirror.send()
    assert list(mirror.sending(iter([end(tmp_path, cell, result={})]))) == [(cell, "")]


def test_each_bucket_has_a_local_directory_of_its_own(tmp_path):
    directory, remote = local(BUCKET, tmp_path)
    assert remote == BUCKET and directory != local(BUCKET + "2", tmp_path)[0]
    assert directory.parent == tmp_path
    assert local(f"{BUCKET}/", tmp_path) == (directory, remote)


@pytest.mark.parametrize("remote", ["gs://bucket/ablation", "nowhere://bucket"])
def test_a_bucket_that_cannot_be_read_is_said(remote, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=f"--workdir={remote}: .*"):
        Mirror(remote, tmp_path)
