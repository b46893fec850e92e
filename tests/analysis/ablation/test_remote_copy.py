"""An ablation in a bucket: an in-memory file system, and machines that share only its files."""

import json
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.remote_copy import RemoteCopy, local_directory
from tests.errors import rejects

BUCKET = "memory://bucket/ablation"
PLAN = '{"code": "1", "trials": []}'


@pytest.fixture
def uploads(monkeypatch):
    """Returns the list of uploaded file names, in order, for a bucket that is initially empty."""
    names, put = [], MemoryFileSystem.put_file
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    monkeypatch.setattr(
        MemoryFileSystem, "put_file", lambda self, source, target: (names.append(target), put(self, source, target))
    )
    return names


def trials(*names):
    return [SimpleNamespace(name=name) for name in names]


def finish(directory, trial, **files):
    """Writes a checkpoint, a summary, a lock and the given JSON files to a trial's directory."""
    folder = runner.trial_directory(directory, trial)
    for name in ("checkpoints/4/array", "summary", runner.LOCK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\0values")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return trial, ""


def test_remote_copy_shares_finished_trials(uploads, tmp_path):
    a, b, c = plan = trials("a_seed=0", "b_seed=0", "c_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = RemoteCopy(BUCKET, one), RemoteCopy(BUCKET, two)
    first.fetch(plan)  # the bucket is empty
    one.mkdir()
    (one / "plan.json").write_text(PLAN)
    first.upload()
    second.fetch(plan)
    assert (two / "plan.json").read_text() == PLAN

    finish(one, b)  # running
    first.upload_trial(*finish(one, a, result={"loss": 1.0}))
    assert len(uploads) == 4 and uploads[-1].endswith("a_seed=0/result.json")  # the result comes last, after its files
    second.upload_trial(*finish(two, c, result={"loss": 2.0}))
    second.fetch_trial(b)  # not finished
    second.fetch_trial(a)
    assert runner.is_done(two, a) and not runner.trial_directory(two, b).exists()
    copied = runner.trial_directory(two, a)
    assert (copied / "checkpoints" / "4" / "array").read_bytes() == b"\0values"
    assert not (copied / runner.LOCK).exists()
    first.fetch(plan)
    assert runner.is_done(one, c) and not runner.is_done(one, b)


def test_remote_copy_fetch_uploads_results_that_were_not_uploaded(uploads, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    finish(tmp_path / "one", trial, result={"loss": 1.0})  # the machine stopped before the upload
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    RemoteCopy(BUCKET, tmp_path / "two").fetch(plan)
    assert runner.is_done(tmp_path / "two", trial)


def test_remote_copy_discards_results_of_another_plan(uploads, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    old = {"code": "1", "trials": [{"name": "a_seed=0", "config": 1}]}
    for directory, code in (("one", "1"), ("two", "2")):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "plan.json").write_text(json.dumps({**old, "code": code}))
    finish(tmp_path / "one", trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, tmp_path / "two").upload()  # another machine restarted the ablation with other code
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    assert not runner.is_done(tmp_path / "one", trial)
    assert json.loads((tmp_path / "one" / "plan.json").read_text())["code"] == "2"

    extended = {"code": "2", "trials": [*old["trials"], {"name": "b_seed=0", "config": 1}]}
    (tmp_path / "two" / "plan.json").write_text(json.dumps(extended))
    RemoteCopy(BUCKET, tmp_path / "two").upload()
    finish(tmp_path / "one", trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, tmp_path / "one").fetch(plan)
    assert runner.is_done(tmp_path / "one", trial)


def test_remote_copy_keeps_local_results(uploads, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    RemoteCopy(BUCKET, one).upload_trial(finish(one, trial, failed={"error": "no data"})[0], "no data")
    finish(two, trial, result={"loss": 1.0})
    RemoteCopy(BUCKET, two).fetch(plan)
    assert not (runner.trial_directory(two, trial) / runner.FAILED).exists()


def test_remote_copy_shares_failures_until_the_trial_succeeds(uploads, tmp_path):
    (trial,) = plan = trials("a_seed=0")
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = RemoteCopy(BUCKET, one), RemoteCopy(BUCKET, two)
    finish(one, trial, failed={"error": "no data"})
    first.upload_trial(trial, "no data")
    second.fetch(plan)
    assert json.loads((runner.trial_directory(two, trial) / runner.FAILED).read_text()) == {"error": "no data"}

    (runner.trial_directory(one, trial) / runner.FAILED).unlink()
    first.upload_trial(*finish(one, trial, result={"loss": 1.0}))
    assert not MemoryFileSystem().exists(f"{BUCKET}/trials/{trial.name}/{runner.FAILED}")
    second.fetch(plan)
    assert runner.is_done(two, trial)


def test_remote_copy_of_a_local_directory_does_nothing(tmp_path):
    assert local_directory(str(tmp_path), tmp_path / "copies") == (tmp_path, "")
    (trial,) = plan = trials("a_seed=0")
    copy = RemoteCopy("", tmp_path)
    finish(tmp_path, trial, result={})
    before = sorted(tmp_path.rglob("*"))
    copy.fetch(plan)
    copy.fetch_trial(trial)
    copy.upload()
    copy.upload_trial(trial, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_local_directory_is_unique_per_bucket(tmp_path):
    directory, remote = local_directory(BUCKET, tmp_path)
    assert remote == BUCKET and directory != local_directory(BUCKET + "2", tmp_path)[0]
    assert directory.parent == tmp_path
    assert local_directory(f"{BUCKET}/", tmp_path) == (directory, remote)


def test_remote_copy_rejects_unsupported_urls(tmp_path, monkeypatch):
    with rejects("nowhere://bucket", None, says="Protocol not known"):
        RemoteCopy("nowhere://bucket", tmp_path)

    def raise_import_error(url):
        raise ImportError("No module named 'gcsfs'")

    monkeypatch.setattr(fsspec, "url_to_fs", raise_import_error)
    with rejects("gs://bucket/ablation", None, says="pip install gcsfs"):
        RemoteCopy("gs://bucket/ablation", tmp_path)
