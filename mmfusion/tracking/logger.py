"""The log of a run: metrics.jsonl, the sinks of its config, and a progress bar or plain lines on the terminal."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mmfusion.files import DISK_FULL, AppendFile, remove_temporary_files, sync_file, to_builtin, write_text
from mmfusion.tracking.sinks import open_sinks

LINE_METRICS = ("loss", "accuracy", "macro_f1", "auroc", "ece", "rmse", "r2")  # printed; metrics.jsonl has all of them


class Logger:
    """Writes one line of `metrics.jsonl` and the same scalars to the sinks per call, and shows the progress.

    On a terminal the `train` split drives a progress bar; elsewhere every `plain_every`-th call prints one plain line.
    Other splits print a line each. A host that is not primary writes and prints nothing.

    Args:
      workdir: the run's directory, created if missing.
      primary: whether this host writes.
      resume_step: the step the run continues from; lines of later steps and an incomplete last line are dropped.
      total_steps: of the whole run, for the bar and the time left.
      plain_every: calls per plain line.
      config: of the run, as JSON values, for the sinks that it names; without any, TensorBoard is the sink.
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
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ):
        self.primary = primary
        if not primary:
            return
        self._workdir = pathlib.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._total_steps, self._plain_every = total_steps, plain_every
        self._console = console or Console(markup=False, emoji=False)
        self._calls = 0
        self._start: tuple[int, float] | None = None
        path = self._workdir / "metrics.jsonl"
        resumed = path.exists()
        remove_temporary_files(self._workdir)
        _drop_after(path, resume_step)
        self._lines, self._failing = AppendFile(path), False
        self._sinks = open_sinks(config or {}, self._workdir, resume_step if resumed else None, self.print)
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _progress_bar(self._console)
            self._task = self._bar.add_task(
                "", total=total_steps, completed=resume_step, metrics="starting", left="-:--:--"
            )
            self._bar.start()

    def log(self, step: int, values: Mapping[str, Any], split: str = "train") -> None:
        """Records the metrics of a split after `step` updates; what a full disk does not take is kept for later calls.

        Args:
          step: updates done.
          values: metrics by name, JSON types or NumPy numbers; the bar and the plain lines show `examples_per_second`,
            `loss`, `accuracy` and `learning_rate`.
          split: `train`, `valid` or `test`.
        """
        if not self.primary:
            return
        values = to_builtin(values)
        self._write(int(step), values, split)
        if split == "train":
            self._show_progress(int(step), values)
        else:
            self.print(f"{split:>5}  step {step}  {_metrics_line(values)}")

    def _write(self, step: int, values: Mapping[str, Any], split: str) -> None:
        line = json.dumps({"step": step, "split": split, **values}) + "\n"
        scalars = {f"{split}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        failure = None
        try:
            self._lines.write(line.encode())
        except OSError as error:
            failure = error
        for sink in self._sinks:
            try:
                sink.write_scalars(step, scalars)
            except OSError as error:
                failure = error
        if failure and not self._failing:
            self.print(f"{split:>5}  warning: cannot write the log: {failure.strerror}; it is kept and written later")
        self._failing = failure is not None

    def _show_progress(self, step: int, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._start = self._start or (step, now)  # the first call includes compilation: timing starts after it
        done, seconds = step - self._start[0], now - self._start[1]
        left = duration(seconds / done * (self._total_steps - step)) if done > 0 else "-:--:--"
        if self._bar:
            self._bar.update(self._task, completed=step, metrics=_progress_metrics(values, " "), left=left)
        elif self._calls % self._plain_every == 0 or step >= self._total_steps:
            self.print(f"train  step {step}/{self._total_steps}  {_progress_metrics(values, '  ')}  {left} left")
        self._calls += 1

    def print(self, renderable: Any) -> None:
        """Prints text or a table, above the progress bar if there is one."""
        if self.primary:
            try:
                self._console.print(
                    renderable, soft_wrap=isinstance(renderable, str), highlight=False, markup=False, emoji=False
                )
            except OSError as error:
                if error.errno not in DISK_FULL:  # standard output may be a file on a full disk
                    raise

    def sync(self) -> None:
        """Flushes the log to the disk, so that it survives a power loss; raises OSError where that fails."""
        if self.primary:
            self._lines.sync()
            sync_file(self._workdir)

    def close(self, *, failed: bool = False) -> None:
        """Closes the progress bar, the files and the sinks; `failed` marks the run as failed in the sinks."""
        if self.primary:
            if self._bar:
                self._bar.stop()
            self._lines.close()
            for sink in self._sinks:
                sink.close(failed=failed)

    def __enter__(self) -> "Logger":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.close(failed=error is not None)


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Drops lines of later steps, an incomplete last line, and the test split's: a resumed run tests again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step and '"split": "test"' not in line]
    if kept != lines:
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """Returns the step of a line of metrics.jsonl, infinity for an incomplete one."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if line.endswith("\n"):
            return float(json.loads(line)["step"])
    return math.inf


def _progress_bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TextColumn("{task.fields[left]}", style="dim"),
        console=console,
        expand=True,
        refresh_per_second=4,
    )


def _progress_metrics(values: Mapping[str, Any], separator: str) -> str:
    formats = {
        "examples_per_second": lambda v: f"{_short(v)} ex/s",
        "loss": lambda v: f"loss {v:.4f}" if abs(v) < 100 else f"loss {v:.2e}",
        "accuracy": lambda v: f"acc {v:.3f}",
        "learning_rate": lambda v: f"lr {v:.1e}",
    }
    parts = []
    for name, formatted in formats.items():
        if name in values:
            parts.append(f"{name} not finite" if values[name] is None else formatted(values[name]))
    return separator.join(parts)


def _metrics_line(values: Mapping[str, Any]) -> str:
    shown = [(name, value) for name, value in values.items() if name.rpartition("/")[2] in LINE_METRICS]
    return "  ".join(f"{name} {format_metric(value)}" for name, value in shown)


def format_metric(value: float | None) -> str:
    """Returns a metric as text: a dash for None, four decimals for a float."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """Returns seconds as hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
