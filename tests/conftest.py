"""What every test shares: the CPU, folders of compiled programs and of prepared datasets, and a tiny config.

`shared_dir` is made once by the pytest process that starts the workers, and removed when it ends; the workers and the
commands that tests start find it in the environment. Compiled programs stay in pytest's cache, so that the next run
takes half the time.
"""

import collections
import fcntl
import gc
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiers
from tests.processes import Started

# Before anything imports JAX. Programs compiled for another platform would test something else than CI does.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The threads of several workers wait for each other in busy loops: boosting took 30 times as long on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Most of a test's time is compiling programs that run a few steps: half the work of XLA halves it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Half of what is left; an XLA that does not know a flag would abort.
if importlib.metadata.version("jax").startswith("0.10."):
    quick = (
        "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false "
        "--xla_llvm_disable_expensive_passes=true"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

gc.set_threshold(100_000, 20, 50)  # traced programs are many small objects that stay

PROGRAM_BYTES = 2 << 30  # compiled programs of earlier runs are removed where they take more
SHARED = "MMFUSION_TESTS_SHARED"  # environment variable: the folder that all processes of one pytest run share


def pytest_configure(config: pytest.Config) -> None:
    # Where a shell runs pytest in the background or under `nohup`, both are ignored, also by the commands under test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if hasattr(config, "workerinput"):
        return  # a worker: the process that started it has made the folder
    shared = tempfile.mkdtemp(prefix="mmfusion-tests-")  # mode 0700: it holds code
    config.add_cleanup(lambda: shutil.rmtree(shared, ignore_errors=True))
    os.environ[SHARED] = shared
    os.environ["XDG_STATE_HOME"] = f"{shared}/state"  # what tests train with is not trusted later
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _program_folder(config, shared))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def _program_folder(config: pytest.Config, shared: str) -> str:
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return f"{shared}/programs"
    folder = config.cache.mkdir(f"programs-{platform.node()}")  # code for this machine's processor
    if sum(file.stat().st_size for file in folder.iterdir()) > PROGRAM_BYTES:
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)
    return str(folder)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups, and before tests are deselected by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "thorough" not in config.option.markexpr and not any("::" in argument for argument in config.args):
        _check_cases(items)
        thorough = [item for item in items if _is_thorough(item)]
        config.hook.pytest_deselected(items=thorough)
        items[:] = [item for item in items if item not in thorough]
    for item in items:
        if item.get_closest_marker("spread") is None:  # a file's tests share what they prepared, on one worker
            item.add_marker(pytest.mark.xdist_group(str(item.path)))
        given = {marker.name for marker in item.iter_markers()} & tiers.NAMES
        if len(given) > 1:
            raise pytest.UsageError(f"{item.nodeid} is marked {' and '.join(sorted(given))}; give it one of these")
        if not given:
            item.add_marker("process" if "command" in getattr(item, "fixturenames", ()) else "unit")
    # The longest files first, so that no worker is left with one at the end.
    tiers_of: dict[Path, set[str]] = {}
    for item in items:
        tiers_of.setdefault(item.path, set()).update(marker.name for marker in item.iter_markers())
    items.sort(key=lambda item: ("process" not in tiers_of[item.path], "loop" not in tiers_of[item.path]))


def _check_cases(items: list[pytest.Item]) -> None:
    """Refuses a `thorough(but=...)` that names a case which its test does not have."""
    cases: dict[str, set[str]] = {}
    for item in items:
        if hasattr(item, "callspec"):
            cases.setdefault(item.nodeid.partition("[")[0], set()).add(item.callspec.id)
    for item in items:
        named = {case for marker in item.iter_markers("thorough") for case in marker.kwargs.get("but", ())}
        test = item.nodeid.partition("[")[0]
        if unknown := named - cases.get(test, set()):
            raise pytest.UsageError(f"{test} has no case {', '.join(sorted(unknown))}")


def _is_thorough(item: pytest.Item) -> bool:
    """Says whether a test or this case of it is thorough: `thorough(but=("a",))` leaves the case `a` in the suite."""
    marker = item.get_closest_marker("thorough")
    return marker is not None and not (hasattr(item, "callspec") and item.callspec.id in marker.kwargs.get("but", ()))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names long bytes without their content, which may differ between workers, such as the time in a gzip file."""
    return "bytes" if isinstance(val, bytes) and len(val) > 30 else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Notes what a test starts, its fixtures included."""
    tiers.watch()
    tiers.started.clear()
    return (yield)


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that starts what its marker rules out: see `tests/README.md`."""
    yield
    name = next(marker.name for marker in request.node.iter_markers() if marker.name in tiers.NAMES)
    wrong = [what for what in tiers.started if what.partition(" ")[0] in tiers.RULED_OUT[name]]
    assert not wrong, f"a test marked {name!r} started {', '.join(wrong)}"


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forgets compiled programs where they are many: all of them take more memory maps than Linux gives a process."""
    yield
    from mmfusion.analysis.ablation import runner

    runner.clear_programs(20_000)


@pytest.fixture(scope="session", autouse=True)
def initialised_by_parameter() -> Iterator[None]:
    """Draws parameters as the model is traced, instead of compiling a program for each model."""
    from tests import initialization

    with initialization.by_parameter():
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_cache(shared_dir: Path) -> Iterator[None]:
    """Keeps what is computed from rows in a folder of this pytest run instead of the home directory."""
    from mmfusion.data import cache

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "auto_folder", lambda: shared_dir / "rows")
        yield


@pytest.fixture(scope="session")
def setups() -> collections.OrderedDict:
    """What the modules that ask for `traced_once` have traced so far."""
    return collections.OrderedDict()


@pytest.fixture(scope="module")
def traced_once(setups: collections.OrderedDict) -> Iterator[None]:
    """A module that asks for it shares traced steps with the others that do, however often its tests train a config.

    Only for modules that do not patch what is traced. Tests that kill runs show that a resumed run is bit-identical
    with steps traced by another process.
    """
    from mmfusion.training.setup import shared_setups

    with shared_setups(setups):
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """A folder that all workers of this pytest run share, removed at its end."""
    return Path(os.environ[SHARED])


@pytest.fixture(scope="session")
def prepare(shared_dir: Path) -> Callable[..., str]:
    """`prepare("shapes/match", manual_dir="")` -> the TFDS folder with that dataset prepared, once for all workers.

    Of the shapes there is a tenth.
    """

    def prepare(name: str, manual_dir: str = "") -> str:
        from mmfusion.data import sources
        from mmfusion.data.builders.shapes import shapes_dataset_builder as shapes

        data_dir = shared_dir / "tfds"
        data_dir.mkdir(exist_ok=True)
        tenth = {n: (*how, tuple(x // 10 for x in sizes), what) for n, (*how, sizes, what) in shapes.VARIANTS.items()}
        with (shared_dir / "tfds.lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            patch.setattr(shapes, "VARIANTS", tenth)
            sources.open_source(name, "train", data_dir=str(data_dir), manual_dir=manual_dir, seed=0)
        return str(data_dir)

    return prepare


@pytest.fixture(scope="session")
def data_dir(prepare: Callable[..., str]) -> str:
    """The TFDS folder with `shapes/match` prepared: give it as `data.dir`."""
    return prepare("shapes/match")


@pytest.fixture(scope="session")
def tiny_config(data_dir: str) -> Callable[..., Any]:
    """`tiny_config("fusion=gmu", {"steps": 4, "optim.accumulate": 2})` -> quickstart at width 8, 8 steps of 16 rows.

    The changes are by dotted path; see `tests/tiny.py` for what is small. Of the `match` variant.
    """
    from tests import tiny

    return lambda arg="", changes=None: tiny.config(arg, {"data.dir": data_dir, **(changes or {})})


@pytest.fixture(scope="session")
def tiny_flags(data_dir: str) -> Callable[..., list[str]]:
    """`tiny_flags({"steps": 4})` -> the flags of `python -m experiments.train` for the same, without `--workdir`."""
    from tests import tiny

    return lambda changes=None: tiny.flags({"data.dir": data_dir, **(changes or {})})


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """`command("experiments.train", *flags)` -> the finished process, with its text output."""

    def command(module: str, *flags: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
        process = Started(module, flags, **environment)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess([module, *flags], process.poll(), out, err)

    return command
