"""Old names of config keys."""

import pytest
from absl import flags

from configs import quickstart
from experiments import cli, trial_config
from mmfusion import config as configs
from mmfusion.config import defaults, renamed
from tests import tiny

OLD_FILE = """
from mmfusion.config import defaults

def get_config(arg=""):
    config, args = defaults.begin(arg)
    config.recovery.updates = 7
    config.data.instead = "mnist"
    return {end}
"""


@pytest.fixture(autouse=True)
def _reset_warnings():
    renamed.warn_renamed.cache_clear()


def test_renamed_keys_have_defaults_under_the_new_name_only():
    for old, new in configs.RENAMED_KEYS.items():
        assert tiny.has(defaults.get_config(), new) and not tiny.has(defaults.get_config(), old)


@pytest.mark.parametrize("joined", [True, False])
def test_renamed_keys_work_as_flags_with_a_warning(joined, pytestconfig, monkeypatch, capsys):
    monkeypatch.chdir(pytestconfig.rootpath)
    flag = ["--config.recovery.spike=3"] if joined else ["--config.recovery.spike", "3"]
    argv = ["train", "--config=configs/quickstart.py", *flag, "--config.recovery.lr_factor=0.2"]
    config = cli.parse_config(argv, flags.FlagValues())
    assert (config.recovery.spike_threshold, config.recovery.lr_factor) == (3.0, 0.2)
    configs.check(config, 1)
    line = "warning: config.recovery.spike is now called config.recovery.spike_threshold\n"
    assert capsys.readouterr().err == line
    cli.parse_config(argv, flags.FlagValues())
    assert capsys.readouterr().err == ""  # once per process


@pytest.mark.parametrize("end", ["defaults.finish(config, args)", "config.lock()"])
def test_renamed_keys_work_in_config_files(end, tmp_path, capsys):
    (tmp_path / "old.py").write_text(OLD_FILE.format(end=end))
    config = cli.make_config(str(tmp_path / "old.py"), [])
    assert (config.recovery.max_consecutive_bad_steps, config.data.fallback_name) == (7, "mnist")
    assert "updates" not in config.recovery and config.is_locked
    assert capsys.readouterr().err.splitlines() == [
        "warning: config.data.instead is now called config.data.fallback_name",
        "warning: config.recovery.updates is now called config.recovery.max_consecutive_bad_steps",
    ]


def test_renamed_keys_in_saved_runs_are_read_without_a_warning(capsys):
    config = quickstart.get_config()
    saved = configs.to_json(config)
    for old, new in configs.RENAMED_KEYS.items():
        section, old_name = old.split(".")
        saved[section][old_name] = saved[section].pop(new.split(".")[1])
    assert configs.from_json(saved) == config
    assert capsys.readouterr().err == ""


def test_renamed_keys_can_be_varied(capsys):
    assert trial_config.values("recovery.spike=3,4") == ("recovery.spike_threshold", [3, 4])
    assert "config.recovery.spike_threshold" in capsys.readouterr().err
