"""Small runs in processes that may be killed, and comparisons of two runs."""

import contextlib
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments import cli, reproduce
from mmfusion import config as configs
from mmfusion.checkpoints.manager import load_verified

CONTEXT = multiprocessing.get_context("forkserver")  # a process that has imported JAX but not initialised it
CONTEXT.set_forkserver_preload(["mmfusion.training.loop", "mmfusion.analysis.probing.probe", "experiments.cli"])

SHORT = (
    "--config.steps=60", "--config.eval_every=20", "--config.checkpoint_every=7", "--config.log_every=1",
    "--config.batch_size=16", "--config.data.train=train[:256]", "--config.data.test=test[:64]",
    "--config.model.width=8",
)  # fmt: skip
IMAGES = ("--config.model.encoders.image.channels=(4,8)", "--config.model.encoders.image.strides=(4,2)")
WORDS = ("--config.model.encoders.text.embedding=8", "--config.model.encoders.text.hidden=8")


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its config, overrides, and the number of forced CPU devices."""

    name: str
    source: str
    changes: tuple[str, ...]
    devices: int = 1


CASES = (
    Case(
        "plateau, accumulation, augmentation",
        "configs/quickstart.py:fusion=concat",
        (
            *SHORT, *IMAGES, *WORDS, "--config.optim.accumulate=2", "--config.optim.schedule.name=plateau",
            "--config.optim.schedule.patience=1", "--config.data.modalities.image.augment.flip=0.5",
            "--config.data.modalities.image.augment.crop=2", "--config.model.encoders.text.dropout=0.1",
        ),
    ),
    Case(
        "VAE sampling, modality dropout",
        "configs/quickstart.py:fusion=gmu,objectives=mvae+modality_dropout",
        (*SHORT, *IMAGES, *WORDS),
    ),
    Case(
        "attention, jit on two devices",
        "configs/quickstart.py:fusion=cross_attention",
        (*SHORT, *IMAGES, *WORDS, "--config.parallel.mode=jit", "--config.model.fusion.heads=2"),
        devices=2,
    ),
    Case(
        "batch norm, joined images, an LSTM over the feature map",
        "configs/xray_ct.py:size=16",
        (*SHORT, "--config.model.encoders.xray.channels=(4,8)", "--config.model.encoders.xray.hidden=8"),
    ),
    Case("image, text and a knowledge graph", "configs/knowledge.py", SHORT),
)  # fmt: skip


SHORTEST = dataclasses.replace(
    CASES[0],
    changes=(*CASES[0].changes, "--config.steps=12", "--config.eval_every=6", "--config.checkpoint_every=6",
             "--config.log_every=4"),
)  # fmt: skip


def start(case: Case, workdir: Path, locations: Sequence[str] = (), **environment: str) -> multiprocessing.Process:
    """Starts or resumes a run; its output goes to `WORKDIR.log`.

    Args:
      case: the run.
      workdir: its directory.
      locations: overrides for the location of the data.
      environment: environment variables of the process.
    """
    # not a daemon: it may start processes that read data
    process = CONTEXT.Process(target=_train, args=(case, workdir, tuple(locations), environment))
    process.start()
    return process


def stop_all() -> None:
    """Stops the fork server, so that the next one takes the current environment."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()


def _train(case: Case, workdir: Path, locations: Sequence[str], environment: dict[str, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    flags = f"--xla_force_host_platform_device_count={case.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)

    def command(_: Sequence[str]) -> None:
        import jax

        from mmfusion.training.loop import train

        config = cli.make_config(case.source, (*case.changes, *locations))
        cli.prepare(config)
        configs.check(config, jax.device_count())
        train(config, workdir)

    try:
        cli.run(command)
    finally:
        sys.stdout.flush()


def whole(case: Case, workdir: Path, locations: Sequence[str] = ()) -> None:
    """Runs a case from start to end; raises RuntimeError if it fails."""
    process = start(case, workdir, locations)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{case.name}: exit {process.exitcode}: {last_error(workdir)}")


def last_error(workdir: Path) -> str:
    """Returns the last error line of a run's output, else its last line."""
    with contextlib.suppress(OSError):
        lines = Path(f"{workdir}.log").read_text().strip().splitlines() or [""]
        return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return ""


def differences(one: Path, other: Path) -> list[str]:
    """Returns the bitwise differences of two finished runs: logged steps, scores, newest state."""
    results = [configs.read_json(workdir / "result.json") for workdir in (one, other)]
    lines = reproduce.differences(one, other, *results)
    states = [newest_state(workdir) for workdir in (one, other)]
    for path in sorted({*states[0], *states[1]}):
        if path not in states[0] or path not in states[1] or not np.array_equal(states[0][path], states[1][path]):
            lines.append(f"state {path} differs")
    return lines


def newest_state(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the verified arrays of a run's newest checkpoint."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    return load_verified(workdir / "checkpoints" / str(max(steps)))[0]


@contextlib.contextmanager
def preloaded(library: Path) -> Iterator[None]:
    """Starts processes with a preloaded library (LD_PRELOAD)."""
    stop_all()
    os.environ["LD_PRELOAD"] = str(library)
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]
        stop_all()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yields a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="mmfusion-reliability-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
