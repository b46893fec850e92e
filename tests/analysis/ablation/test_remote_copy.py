"""An ablation in a bucket: a stand-in for its file system, and machines that see nothing but what is in it."""

import json
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.remote_copy import RemoteCopy, local_directory
from mmfusion.errors import UserError

BUCKET = "memory://bucket/ablation"
PLAN = '{"code": "1", "trials": []}'


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


def trials(*names):
    return [SimpleNamespace(name=name) for name in names]


def end(directory, trial, **files):
    """Leaves files in a trial's folder, and its checkpoint."""
    folder = runner.trial_directory(directory, trial)
    for name in ("checkpoints/4/array", "summary", runner.LOCK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0numbers")
    for name, said in files.items():
        (folder / f"{name}.json").write_text(json.dumps(said))
    return trial, ""


def test_remote_copy_shares_finished_trials(sent, tmp_path):
    a, b, c = plan = trials("a_seed=0", "b_seed=0", "c_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = RemoteCopy(BUCKET, one), RemoteCopy(BUCKET, two)
    first.fetch(plan)  # there is nothing yet
    one.mkdir()
    (one / "plan.json").write_text(PLAN)
    first.upload()
    second.fetch(plan)
    assert (two / "plan.json").read_text() == PLAN

    end(one, b)  # under way
    done = first.uploading(iter([end(one, a, result={"loss": 1.0})]))
    assert list(done) == [(a, "")]
    assert len(sent) == 4 and sent[-1].endswith("a_seed=0/result.json")  # who sees the result sees the rest
    list(second.uploading(iter([end(two, c, result={"loss": 2.0})])))
    second.fetch(plan)
    assert runner.is_done(two, a) and not runner.trial_directory(two, b).exists()
    copied = runner.trial_directory(two, a)
    assert (copied / "checkpoints" / "4" / "array").read_bytes() == b"\0numbers"
    assert not (copied / runner.LOCK).exists()
    first.fetch(plan)
    assert runner.is_done(one, c) and not runner.is_done(one, b)


def test_remote_copy_uploads_late_what_a_lost_machine_did_not(sent, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    end(tmp_path / "one", trial, result={"loss": 1.0})  # and then the machine was lost
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    RemoteCopy(BUCKET, tmp_path / "two").fetch(plan)
    assert runner.is_done(tmp_path / "two", trial)


def test_remote_copy_drops_another_plan(sent, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    old = {"code": "1", "trials": [{"name": "a_seed=0", "config": 1}]}
    for directory, code in (("one", "1"), ("two", "2")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "plan.json").write_text(json.dumps({**old, "code": code}))
    end(tmp_path / "one", trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, tmp_path / "two").upload()  # the bucket was begun anew, by another machine and with other code
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    assert not runner.is_done(tmp_path / "one", trial)
    assert json.loads((tmp_path / "one" / "plan.json").read_text())["code"] == "2"

    grown = {"code": "2", "trials": [*old["trials"], {"name": "b_seed=0", "config": 1}]}
    (tmp_path / "two" / "plan.json").write_text(json.dumps(grown))
    RemoteCopy(BUCKET, tmp_path / "two").upload()
    end(tmp_path / "one", trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    assert runner.is_done(tmp_path / "one", trial)


def test_remote_copy_keeps_what_is_finished_here(sent, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    list(RemoteCopy(BUCKET, one).uploading(iter([(end(one, trial, failed={"error": "no data"})[0], "no data")])))
    end(two, trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, two).fetch(plan)
    assert not (runner.trial_directory(two, trial) / runner.FAILED).exists()


def test_remote_copy_shares_failures_and_their_end(sent, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = RemoteCopy(BUCKET, one), RemoteCopy(BUCKET, two)
    end(one, trial, failed={"error": "no data"})
    list(first.uploading(iter([(trial, "no data")])))
    second.fetch(plan)
    assert json.loads((runner.trial_directory(two, trial) / runner.FAILED).read_text()) == {"error": "no data"}

    (runner.trial_directory(one, trial) / runner.FAILED).unlink()
    list(first.uploading(iter([end(one, trial, result={"loss": 1.0})])))
    assert not MemoryFileSystem().exists(f"{BUCKET}/trials/{trial.name}/{runner.FAILED}")
    second.fetch(plan)
    assert runner.is_done(two, trial)


def test_remote_copy_of_a_local_directory_does_nothing(tmp_path):
    assert local_directory(str(tmp_path), tmp_path / "copies") == (tmp_path, "")
    (trial,) = plan = trials("a_seed=0")
    copy = RemoteCopy("", tmp_path)
    copy.fetch(plan)
    copy.upload()
    assert list(copy.uploading(iter([end(tmp_path, trial, result={})]))) == [(trial, "")]


def test_local_directory_is_one_per_bucket(tmp_path):
    directory, remote = local_directory(BUCKET, tmp_path)
    assert remote == BUCKET and directory != local_directory(BUCKET + "2", tmp_path)[0]
    assert directory.parent == tmp_path
    assert local_directory(f"{BUCKET}/", tmp_path) == (directory, remote)


def test_remote_copy_refuses_a_url_that_nothing_reads(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nowhere://bucket cannot be reached: Protocol not known"):
        RemoteCopy("nowhere://bucket", tmp_path)

    def missing(url):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match="gs://bucket/ablation: gs:// needs `pip install gcsfs`"):
        RemoteCopy("gs://bucket/ablation", tmp_path)
