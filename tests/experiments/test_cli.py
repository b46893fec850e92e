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
from mmfusion.errors import Preempted, Unreachable, UserError

QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture(autouse=True)
def root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


def parse(*argv):
    return cli.parse_config(["train", *argv], flags.FlagValues())


# --- the config file and its arguments ---


def test_arguments_are_typed_and_overrides_reach_their_fields():
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


def test_flags_may_stand_apart_from_their_values_and_come_first():
    config = parse("--config.steps", "30", "--config.model.fusion.name", "gmu", "--config", "configs/quickstart.py")
    assert (config.steps, config.model.fusion.name) == (30, "gmu")


def test_the_config_is_locked():
    config = parse(QUICKSTART, "--config.steps=30")
    with pytest.raises((AttributeError, KeyError)):
        config.nothing = 1


def test_choosing_brings_the_options_of_the_choice():
    config = parse(
        QUICKSTART, "--config.model.fusion.name=concat", "--config.optim.name=momentum",
        "--config.optim.schedule.name=step", "--config.model.encoders.text.name=bow",
    )  # fmt: skip
    assert config.model.fusion.to_dict() == {"name": "concat", **configs.choice_keys("model.fusion", "concat")}
    assert config.optim.momentum == 0.9
    assert set(config.optim.schedule) == {"name", "boundaries", "factor"}
    assert config.optim.learning_rate == parse(QUICKSTART).optim.learning_rate
    configs.check(config, 1)


def test_the_order_of_flags_does_not_matter():
    argv = [
        "--config.model.fusion.layers=3", "--config.model.fusion.name=concat", "--config.optim.momentum=0.5",
        "--config.optim.learning_rate=0.1", "--config.optim.name=momentum", QUICKSTART,
    ]  # fmt: skip
    one, other = parse(*argv), parse(*argv[::-1])
    assert one == other
    assert (one.model.fusion.layers, one.optim.momentum, one.optim.learning_rate) == (3, 0.5, 0.1)


def test_an_empty_argument_is_none():
    assert parse(f"{QUICKSTART}:") == parse(QUICKSTART)


SECTION = "config.data.modalities.image"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], r"--config=configs/X\.py is missing"),
        (["--config=configs/quickstar.py"], r"configs/quickstar\.py is no file: did you mean configs/quickstart\.py"),
        (["--config=configs/__init__.py"], r"defines no get_config"),
        ([f"{QUICKSTART}:fusion=gmu,left"], r"'left' is not key=value"),
        ([f"{QUICKSTART}:fusions=gmu"], r"'fusions=gmu' is not key=value of a known key: did you mean fusion"),
        ([f"{QUICKSTART}:seed=one"], r"seed='one' is not of type int"),
        ([QUICKSTART, "--config.stps=3"], r"config\.stps is no key: did you mean steps"),
        ([QUICKSTART, "--config.model.fusion.head=3"], r"config\.model\.fusion\.head is no key: did you mean heads"),
        ([QUICKSTART, "--config.steps.more=3"], r"config\.steps\.more is no key: config\.steps is a value"),
        ([QUICKSTART, "--config.model.fusion.name=gum"], r"fusion\.name='gum' is unknown: did you mean sum or gmu"),
        ([QUICKSTART, "--config.model.fusion=gmu"], r"config\.model\.fusion is a section: set one of its keys, .*name"),
        ([QUICKSTART, "--config.model.fusion.name=gmu", "--config.model.fusion.heads=2"], r"fusion\.heads is no key"),
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
def test_a_wrong_flag_is_named_in_one_line(argv, says):
    with pytest.raises(UserError, match=says) as error:
        parse(*argv)
    assert "\n" not in str(error.value)


# --- exit status ---


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
def test_each_end_has_its_status_and_one_line(raised, status, line, capsys):
    def main(_):
        if raised:
            raise raised

    if status is None:
        cli.run(main)
    else:
        with pytest.raises(SystemExit) as stop:
            cli.run(main)
        assert stop.value.code == status
    assert capsys.readouterr().err == line


def test_what_orbax_logs_of_an_error_that_it_raises_is_not_shown(caplog):
    def main(_):
        for name in ("absl", "asyncio"):
            logging.getLogger(name).error("Task exception was never retrieved")
        raise CorruptCheckpoint("checkpoint 3 is damaged")

    with pytest.raises(SystemExit):
        cli.run(main)
    assert caplog.records == []


def test_a_bug_keeps_its_traceback():
    def main(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run(main)


def test_the_command_ends_with_2_and_one_line_before_it_makes_anything(command, tmp_path):
    run = command(
        "experiments.train", f"{QUICKSTART}:fusion=gmu", f"--workdir={tmp_path}/run", "--config.optim.learning_rate=-1",
        f"--config.data.dir={tmp_path}/data",
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == "error: config.optim.learning_rate=-1.0 must be a finite number and not negative\n"
    assert run.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "argv", "says"),
    [
        ("experiments.evaluate", ["--workdir={}/none"], "none is no run directory"),
        ("experiments.predict", ["--workdir={}"], "flag --input="),
    ],
)
def test_the_other_commands_too(module, argv, says, command, tmp_path):
    run = command(module, *(part.format(tmp_path) for part in argv))
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert says in run.stderr


# --- the compilation cache ---


def test_compiled_programs_are_the_owners_only(monkeypatch, tmp_path):
    told = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", "/elsewhere")
        cli.settle_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        cli.settle_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mmfusion" / "jax")
        assert stat.S_IMODE(os.stat(tmp_path / "mmfusion" / "jax").st_mode) == 0o700
    finally:
        jax.config.update("jax_compilation_cache_dir", told)


def test_errors_of_other_libraries_threads_are_not_shown_and_others_are(monkeypatch):
    """TensorStore's C++ threads tell theirs, which are of no object, in the midst of what else is said."""
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    cli._settle()
    errors = [
        SimpleNamespace(exc_value=RuntimeError(said), object=of)
        for said, of in (("Event loop is closed", None), ("another one", None), ("Event loop is closed", "a loop"))
    ]
    for error in errors:
        sys.unraisablehook(error)
    assert shown == errors[1:]
