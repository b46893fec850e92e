import logging
import os
import stat
import sys
from types import SimpleNamespace

import jax
import pytest
from absl import flags

from experiments import cli
from mmfusion import config as configs
from mmfusion.checkpoints.verify import CorruptCheckpoint
from mmfusion.distributed import platform
from mmfusion.errors import Preempted, Unreachable, UserError
from tests.errors import rejects

QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture(autouse=True)
def root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def parse(*argv):
    return cli.parse_config(["train", *argv], flags.FlagValues())


# --- The config file and its arguments ---


def test_parse_config_converts_arguments_and_overrides():
    config = parse(
        f"{QUICKSTART}:fusion=gmu,seed=7", "--config.optim.learning_rate=1", "--config.steps=30",
        "--config.data.modalities.image.size=(16,24)", "--config.model.encoders.text.bidirectional=true",
        "--config.data.name=mnist",
    )  # fmt: skip
    assert (config.model.fusion.name, config.seed, config.steps) == ("gmu", 7, 30)
    assert repr(config.optim.learning_rate) == "1.0"
    assert config.data.modalities.image.size == (16, 24)
    assert config.model.encoders.text.bidirectional is True
    assert config.data.name == "mnist"


def test_parse_config_accepts_separate_values_in_any_order():
    config = parse("--config.steps", "30", "--config.model.fusion.name", "gmu", "--config", "configs/quickstart.py")
    assert (config.steps, config.model.fusion.name) == (30, "gmu")


def test_parse_config_returns_a_locked_config():
    config = parse(QUICKSTART, "--config.steps=30")
    with pytest.raises((AttributeError, KeyError)):
        config.nothing = 1


def test_parse_config_name_replaces_its_sections_options():
    config = parse(
        QUICKSTART, "--config.model.fusion.name=concat", "--config.optim.name=momentum",
        "--config.optim.schedule.name=step", "--config.model.encoders.text.name=bow",
    )  # fmt: skip
    assert config.model.fusion.to_dict() == {"name": "concat", **configs.choice_keys("model.fusion", "concat")}
    assert config.optim.momentum == 0.9
    assert set(config.optim.schedule) == {"name", "boundaries", "factor"}
    assert config.optim.learning_rate == parse(QUICKSTART).optim.learning_rate
    configs.check(config, 1)


def test_parse_config_ignores_the_order_of_flags():
    argv = [
        "--config.model.fusion.layers=3", "--config.model.fusion.name=concat", "--config.optim.momentum=0.5",
        "--config.optim.learning_rate=0.1", "--config.optim.name=momentum", QUICKSTART,
    ]  # fmt: skip
    one, other = parse(*argv), parse(*argv[::-1])
    assert one == other
    assert (one.model.fusion.layers, one.optim.momentum, one.optim.learning_rate) == (3, 0.5, 0.1)


def test_parse_config_ignores_an_empty_argument():
    assert parse(f"{QUICKSTART}:") == parse(QUICKSTART)


SECTION = "config.data.modalities.image"


@pytest.mark.parametrize(
    ("argv", "path", "value", "suggestion", "fact"),
    [
        ([], "--config", None, "", "required"),
        (["--config=configs/quickstar.py"], "--config", "configs/quickstar.py", "configs/quickstart.py", ""),
        (["--config=configs/__init__.py"], "--config", "configs/__init__.py", "", "get_config"),
        ([f"{QUICKSTART}:fusion=gmu,left"], "config argument", "left", "", "key=value"),
        ([f"{QUICKSTART}:fusions=gmu"], "config argument", "fusions", "fusion", ""),
        ([f"{QUICKSTART}:seed=one"], "config argument seed", "one", "", "int"),
        ([QUICKSTART, "--config.stps=3"], "config.stps", None, "steps", ""),
        ([QUICKSTART, "--config.model.fusion.name=gum"], "config.model.fusion.name", "gum", "gmu", ""),
        ([QUICKSTART, "--config.model.fusion.head=3"], "config.model.fusion.head", None, "heads", ""),
        ([QUICKSTART, "--config.steps.more=3"], "config.steps.more", None, "", "config.steps is a value"),
        ([QUICKSTART, "--config.model.fusion=gmu"], "config.model.fusion", None, "", "section"),
        (
            [QUICKSTART, "--config.model.fusion.name=gmu", "--config.model.fusion.heads=2"],
            "config.model.fusion.heads", None, "name", "",
        ),
    ],
)  # fmt: skip
def test_parse_config_rejects_unknown_flags_and_keys(argv, path, value, suggestion, fact):
    with rejects(path, value, suggestion, says=fact):
        parse(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([QUICKSTART, "--config.steps=many"], r"config\.steps=many: invalid literal for int"),
        ([QUICKSTART, "--config.steps=1.5"], r"config\.steps=1\.5"),
        ([QUICKSTART, "--config.optim.learning_rate=fast"], r"learning_rate=fast: could not convert"),
        ([QUICKSTART, "--config.steps"], r"[Mm]issing value"),
        (
            [QUICKSTART, f"--{SECTION}.augment.flip=0.5", f"--{SECTION}={{}}"],
            r"image is provided after .*augment\.flip",
        ),
        ([QUICKSTART, "--stepz=3"], r"Unknown command line flag 'stepz'"),
        ([QUICKSTART, "steps=3"], r"unexpected argument 'steps=3': flags begin with --"),
    ],
)
def test_parse_config_reports_an_invalid_value_in_one_line(argv, message):
    with pytest.raises(UserError, match=message) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


# --- Exit status ---


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (None, None, ""),
        (UserError("steps is wrong"), 2, "error: steps is wrong\n"),
        (CorruptCheckpoint("checkpoint 3 is damaged"), 2, "error: checkpoint 3 is damaged\n"),
        (Preempted("saved at step 3"), 75, "preempted: saved at step 3\n"),
        (Unreachable("checkpoint 3 cannot be read for now"), 75, "error: checkpoint 3 cannot be read for now\n"),
    ],
)
def test_run_exits_with_the_errors_status_and_one_line(raised, status, line, capsys):
    def main(_):
        if raised:
            raise raised

    if status is None:
        cli.run(main)
    else:
        with pytest.raises(SystemExit) as caught:
            cli.run(main)
        assert caught.value.code == status
    assert capsys.readouterr().err == line


def test_run_hides_orbax_logs_of_raised_errors(caplog):
    def main(_):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).error("Task exception was never retrieved")
        raise CorruptCheckpoint("checkpoint 3 is damaged")

    with pytest.raises(SystemExit):
        cli.run(main)
    assert caplog.records == []


def test_run_propagates_unexpected_exceptions():
    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


def test_train_command_exits_2_before_writing_files(command, tmp_path):
    run = command(
        "experiments.train", f"{QUICKSTART}:fusion=gmu", f"--workdir={tmp_path}/run", "--config.optim.learning_rate=-1",
        f"--config.data.dir={tmp_path}/data",
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == "error: config.optim.learning_rate=-1.0: must be above 0\n"
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "argv", "message"),
    [
        ("experiments.evaluate", ["--workdir={}/none"], "/none: "),
        ("experiments.predict", ["--workdir={}"], "flag --input="),
    ],
)
def test_evaluate_and_predict_commands_exit_2_on_user_errors(module, argv, message, command, tmp_path):
    run = command(module, *(part.format(tmp_path) for part in argv))
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr


# --- Process configuration ---


def test_compilation_cache_is_readable_by_its_owner_only(monkeypatch, tmp_path):
    original = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        cli.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        cli.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mmfusion" / "jax")
        assert stat.S_IMODE(os.stat(tmp_path / "mmfusion" / "jax").st_mode) == 0o700
    finally:
        jax.config.update("jax_compilation_cache_dir", original)


def test_unraisable_errors_of_tensorstore_threads_are_hidden(monkeypatch):
    """TensorStore's C++ threads report errors without an object, which would interrupt other output."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "__unraisablehook__", reported.append)
    cli._configure_process()
    errors = [
        SimpleNamespace(exc_value=RuntimeError(message), object=source)
        for message, source in (
            ("Event loop is closed", None),
            ("another one", None),
            ("Event loop is closed", "a loop"),
        )
    ]
    for error in errors:
        sys.unraisablehook(error)
    assert reported == errors[1:]


def test_prepare_sets_xla_flags_of_a_deterministic_config(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    cli.prepare(parse(QUICKSTART))
    assert os.environ["XLA_FLAGS"] == ""
    cli.prepare(parse(QUICKSTART, "--config.deterministic=True"))
    assert os.environ["XLA_FLAGS"] == platform.DETERMINISTIC
