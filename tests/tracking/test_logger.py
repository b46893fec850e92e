import contextlib
import io
import json
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from mmfusion.tracking import logger
from tests.checkpoints.test_manager import limit_file_size


def console(terminal=False, width=80):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, _environ={"TERM": "xterm"})


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def crc32c(data):
    crc = 2**32 - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 2**32 - 1


def records(workdir):
    """Returns the events of TFRecord files: 8 bytes of length, 4 of checksum, the event, 4 of checksum."""
    result = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            parts = data[:8], data[12 : 12 + length]
            checksums = [int.from_bytes(x, "little") for x in (data[8:12], data[12 + length : 16 + length])]
            assert [((x >> 15 | x << 17) + 0xA282EAD8) % 2**32 for x in map(crc32c, parts)] == checksums
            result.append(event_pb2.Event.FromString(parts[1]))
            data = data[16 + length :]
    return result


def events(workdir):
    return [(event.step, value.tag, value.simple_value) for event in records(workdir) for value in event.summary.value]


def test_logger_writes_each_call_immediately(tmp_path):
    log = logger.Logger(tmp_path / "run", total_steps=10, console=console())
    log.log(1, {"loss": np.float32(0.5), "accuracy": jnp.float32(0.25)})
    assert lines(tmp_path / "run") == [{"step": 1, "split": "train", "loss": 0.5, "accuracy": 0.25}]
    log.log(1, {"loss": float("nan"), "per_class": {"f1": np.array([0.5, np.nan])}}, "valid")
    assert lines(tmp_path / "run")[1] == {
        "step": 1,
        "split": "valid",
        "loss": None,
        "per_class": {"f1": [0.5, None]},
    }
    log.close()
    assert events(tmp_path / "run") == [(1, "train/loss", 0.5), (1, "train/accuracy", 0.25)]


def test_logger_keeps_lines_that_a_full_disk_rejects(tmp_path):
    screen = console(width=200)
    log = logger.Logger(tmp_path, total_steps=2000, plain_every=2000, console=screen)
    with limit_file_size(10_000):
        for step in range(1, 1000):
            log.log(step, {"loss": 0.5})
        with pytest.raises(OSError, match="File too large"):
            log.sync()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 10_000  # the last line is truncated
    log.log(1000, {"loss": 0.25})
    log.sync()
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 1001)]
    assert events(tmp_path) == [(step, "train/loss", 0.5) for step in range(1, 1000)] + [(1000, "train/loss", 0.25)]
    assert screen.file.getvalue().count("warning: cannot write the log: File too large; it is kept") == 1
    log.close()


def test_logger_survives_a_failing_stdout(tmp_path):
    with open("/dev/full", "w") as full, logger.Logger(tmp_path, total_steps=9, console=Console(file=full)) as log:
        for step in range(1, 10):
            log.log(step, {"loss": 0.5})
        with contextlib.suppress(OSError):
            full.close()
    assert len(lines(tmp_path)) == 9


def test_logger_resume_hides_later_events(tmp_path):
    for step in (0, 3):
        with logger.Logger(tmp_path, resume_step=step, total_steps=9, console=console()) as log:
            log.log(step + 1, {"loss": 0.5})
    session_starts = [event.step for event in records(tmp_path) if event.HasField("session_log")]
    assert session_starts == [4]
    assert [event.file_version for event in records(tmp_path) if event.file_version] == ["brain.Event:2"] * 2


@pytest.mark.parametrize("extra", ['{"step": 2, "lo', '{"step": 2}'])
def test_logger_resume_drops_later_and_incomplete_lines(tmp_path, extra):
    with logger.Logger(tmp_path, total_steps=10, console=console()) as log:
        for step in range(1, 6):
            log.log(step, {"loss": step / 4})
    path = tmp_path / "metrics.jsonl"
    original = path.read_text().splitlines(keepends=True)
    path.write_text("".join(original) + extra)
    (tmp_path / ".metrics.jsonl.0123456789ab").write_text("".join(original[:1]))  # as after a kill during rewriting
    with logger.Logger(tmp_path, resume_step=3, total_steps=10, console=console()) as log:
        assert path.read_text() == "".join(original[:3])
        log.log(4, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 9.0)]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_logger_resume_drops_the_test_line(tmp_path):
    with logger.Logger(tmp_path, total_steps=2, console=console()) as log:
        log.log(1, {"loss": 1.0}, "valid")
        log.log(1, {"loss": 2.0}, "test")
    logger.Logger(tmp_path, resume_step=2, total_steps=2, console=console()).close()
    assert [line["split"] for line in lines(tmp_path)] == ["valid"]


def test_logger_restart_from_step_0_drops_all_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1}\n')
    logger.Logger(tmp_path, total_steps=10, console=console()).close()
    assert lines(tmp_path) == []


def test_logger_writes_nothing_on_other_hosts(tmp_path):
    screen = console()
    with logger.Logger(tmp_path / "run", primary=False, total_steps=10, console=screen) as log:
        log.log(1, {"loss": 1.0})
        log.print("hello")
    assert not (tmp_path / "run").exists()
    assert screen.file.getvalue() == ""


def test_logger_plain_lines_show_step_loss_rate_and_time_left(tmp_path, monkeypatch):
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(logger, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    screen = console(width=40)
    with logger.Logger(tmp_path, total_steps=100, plain_every=2, console=screen) as log:
        for step in (10, 20, 30):
            log.log(step, {"loss": 0.6931, "examples_per_second": 12345.6, "learning_rate": 1e-3})
        log.log(30, {"loss": 0.5, "auroc": None, "confusion": [[1]]}, "valid")
        log.log(100, {"loss": 0.25})
    output = screen.file.getvalue().splitlines()
    assert output == [
        "train  step 10/100  12.3k ex/s  loss 0.6931  lr 1.0e-03  -:--:-- left",
        "train  step 30/100  12.3k ex/s  loss 0.6931  lr 1.0e-03  0:00:14 left",  # 4 s for 20 steps, 70 steps remain
        "valid  step 30  loss 0.5000  auroc –",
        "train  step 100/100  loss 0.2500  0:00:00 left",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_logger_progress_bar_fits_on_one_terminal_line(tmp_path, width):
    screen = console(terminal=True, width=width)
    values = {"loss": 0.6931, "accuracy": 0.987, "examples_per_second": 123456.7, "learning_rate": 1e-3}
    with logger.Logger(tmp_path, total_steps=20000, console=screen) as log:
        log.log(10000, values)
        log.log(12000, values)
        log._bar.refresh()
        log.log(12000, {"accuracy": 0.5}, "valid")
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue().replace("\r", "\n"))
    bars = [line for line in output.splitlines() if "12000/20000" in line]
    assert bars
    for bar in bars:
        assert len(bar.rstrip()) <= width
        assert all(part in bar for part in ("123.5k ex/s", "loss 0.6931", "acc 0.987", "lr 1.0e-03", "0:00:0"))


def test_logger_shows_a_non_finite_loss(tmp_path):
    screen = console()
    with logger.Logger(tmp_path, total_steps=2, console=screen) as log:
        log.log(1, {"loss": float("inf")})
    assert "loss not finite" in screen.file.getvalue()
