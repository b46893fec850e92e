"""What a run leaves to read: metrics.jsonl, TensorBoard events, a progress bar or plain lines."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmfusion.files import DISK_FULL, PARTIAL, Appended, plain, sync_file, write_text
from mmfusion.tracking.tensorboard import Events


class Logger:
    """Writes one line of `metrics.jsonl` and the same scalars to TensorBoard a call, and shows how the run goes.

    On a terminal the `train` split drives a progress bar; elsewhere it prints one plain line in `plain_every` calls.
    Other splits print a line each. A host that is not primary writes and prints nothing.

    Args:
      workdir: the run's directory, made if missing.
      primary: whether this host writes.
      resume_step: the step the run continues from; lines of later steps are dropped first, and a torn last line.
      total_steps: of the whole run, for the bar and the time left.
      plain_every: calls a plain line.
      console: a rich console; the default writes to standard output.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        primary: bool = True,
        resume_step: int = 0,
        *,
        total_steps: int,
        plain_every: int = 1,
        console: Console | None = None,
    ):
        self.primary = primary
        if not primary:
            return
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._total_steps, self._plain_every = total_steps, plain_every
        self._console = console or Console()
        self._calls, self._start = 0, None
        path = self._workdir / "metrics.jsonl"
        continued = path.exists()
        for torn in self._workdir.glob(f".*.{'[0-9a-f]' * PARTIAL}"):  # of `write_text`, which a kill ended
            torn.unlink(missing_ok=True)
        _drop_after(path, resume_step)
        self._lines, self._failing = Appended(path), False
        self._events = Events(self._workdir, after=resume_step if continued else None)
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _progress(self._console)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=resume_step, numbers="starting", left="-:--:--"
            )
            self._bar.start()

    def log(self, step: int, values: Mapping, split: str = "train") -> None:
        """Records the scores of a split after `step` updates; what the disk does not take is kept for the next call.

        Args:
          step: updates done.
          values: scores by name, JSON types or NumPy numbers; the bar and the plain lines show `examples_per_second`,
            `loss`, `accuracy` and `learning_rate` of them.
          split: `train`, `valid` or `test`.
        """
        if not self.primary:
            return
        values = plain(values)
        line = json.dumps({"step": int(step), "split": split, **values}) + "\n"
        scalars = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        failed = None
        for write in (lambda: self._lines.write(line.encode()), lambda: self._events.log(int(step), scalars)):
            try:
                write()
            except OSError as error:
                failed = error
        if failed and not self._failing:
            self.print(
                f"{split:>5}  warning: cannot write what is logged: {failed.strerror}; it is kept, and tried again"
            )
        self._failing = failed is not None
        if split == "train":
            self._show_progress(int(step), values)
        else:
            self.print(f"{split:>5}  step {step}  {_scores(values)}")

    def _show_progress(self, step: int, values: Mapping) -> None:
        now = time.monotonic()
        self._start = self._start or (step, now)  # the first call's time holds the compilation: start counting there
        done, seconds = step - self._start[0], now - self._start[1]
        left = duration(seconds / done * (self._total_steps - step)) if done > 0 else "-:--:--"
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=_numbers(values, " "), left=left)
        elif self._calls % self._plain_every == 0 or step >= self._total_steps:
            self.print(f"train  step {step}/{self._total_steps}  {_numbers(values, '  ')}  {left} left")
        self._calls += 1

    def print(self, renderable) -> None:
        """Prints text or a table, above the progress bar while there is one."""
        if self.primary:
            try:
                self._console.print(renderable, soft_wrap=isinstance(renderable, str), highlight=False, markup=False)
            except OSError as error:
                if error.errno not in DISK_FULL:  # standard output may be a file on a full disk
                    raise

    def sync(self) -> None:
        """Brings what was logged to the disk, where a power loss leaves it; raises OSError where that cannot be."""
        if self.primary:
            self._lines.sync()
            sync_file(self._workdir)

    def close(self) -> None:
        """Ends the bar and the files; what was logged stays."""
        if self.primary:
            if self._bar:
                self._bar.stop()
            self._lines.close()
            self._events.close()

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    # A run that goes on will test again.
    kept = [line for line in lines if _step_of(line) <= step and '"split": "test"' not in line]
    if kept != lines:
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    # A torn line has no step to keep it for.
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if line.endswith("\n"):
            return float(json.loads(line)["step"])
    return math.inf


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("{task.fields[left]}", style="dim"),
        console=console,
        expand=True,
        refresh_per_second=4,
    )


def _numbers(values: Mapping, gap: str) -> str:
    formats = {
        "examples_per_second": lambda v: f"{_short(v)} ex/s",
        "loss": lambda v: f"loss {v:.4f}" if abs(v) < 100 else f"loss {v:.2e}",
        "accuracy": lambda v: f"acc {v:.3f}",
        "learning_rate": lambda v: f"lr {v:.1e}",
    }
    known = {name: values[name] for name in formats if name in values}
    return gap.join(formats[n](v) if v is not None else f"{n} not finite" for n, v in known.items())


SHOWN = ("loss", "accuracy", "macro_f1", "auroc", "ece", "rmse", "r2")  # in a line; metrics.jsonl has all of them


def _scores(values: Mapping) -> str:
    shown = [(n, v) for n, v in values.items() if n.rpartition("/")[2] in SHOWN]
    return "  ".join(f"{n} {format_score(v)}" for n, v in shown)


def format_score(value) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
