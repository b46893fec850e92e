"""Every shipped config is checked, trained and resumed, and all of its keys are read."""

import dataclasses
import functools
import importlib
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import small
from mmfusion import config as configs
from mmfusion import optim
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.config import defaults as base
from mmfusion.config.files import load_file
from mmfusion.data import dataset as datasets
from mmfusion.data import image, modalities, preprocess, targets
from mmfusion.data.batch import Batch
from mmfusion.errors import warn_renamed
from mmfusion.models.build import module_options
from mmfusion.models.encoders import ENCODERS
from mmfusion.models.fusion import FUSIONS
from mmfusion.objectives import Task
from mmfusion.training import setup as training_setup
from mmfusion.training.loop import train
from mmfusion.training.run import read_calls
from tests import key_reads, tiny
from tests.data.test_builders import small_av_digits, small_easy_vqa  # noqa: F401 (fixtures)
from tests.data.test_cifar_imdb import small_cifar_imdb  # noqa: F401 (fixture)
from tests.data.test_manual_files import small_digits, small_fashion, small_leaf  # noqa: F401 (fixtures)
from tests.data.test_synthetic import small_synthetic  # noqa: F401 (fixture)
from tests.models.inputs import FIRST_OF_FAMILY
from tests.processes import ROOT
from tests.training.test_resume import assert_same_run

RENAMED = {"three_pictures": "three_images", "sound_pictures": "audio_images"}
NOT_CONFIGS = {"__init__", "table", *RENAMED}  # table needs one: see tests/experiments/test_inspect.py
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem not in NOT_CONFIGS)
TRAINED = {"quickstart"}  # the thorough tests train the others
STEPPED = {"cifar_imdb", "leaf", "small", "three_images", "xray_ct"}  # and take a step of the others
# Fixtures that make small archives of the same layout, by dataset.
MINIATURES = {
    "easy_vqa": "small_easy_vqa",
    "av_digits": "small_av_digits",
    "pair:cifar10_images+imdb_subset:by=index": "small_cifar_imdb",
    "fashion_small": "small_fashion",
    "leaf": "small_leaf",
    "digit_views": "small_digits",
    "synthetic": "small_synthetic",
}


def get_config(name: str, arg: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the config with four steps of four rows and a small model, and the same components."""
    small = {
        "steps": 4, "batch_size": 4, "eval_every": 2, "checkpoint_every": 3, "log_every": 1, "model.width": 8,
        "data.valid_fraction": 0.5, "model.fusion.layers": 1, "model.fusion.heads": 2,
    }  # fmt: skip
    for m, encoder in config.model.encoders.items():
        channels = encoder.get("channels", 0)
        small[f"model.encoders.{m}.channels"] = 4 if isinstance(channels, int) else (4,) * len(channels)
        if config.data.modalities[m].kind == "audio":
            small[f"data.modalities.{m}.seconds"] = 0.1
        if "size" in config.data.modalities[m]:
            small[f"data.modalities.{m}.size"] = tuple(min(side, 64) for side in config.data.modalities[m].size)
        for width in ("embedding", "hidden"):
            units = encoder.get(width, 0)
            small[f"model.encoders.{m}.{width}"] = 8 if isinstance(units, int) else (8,) * len(units)
    for path, value in small.items():
        if tiny.has(config, path):
            tiny.put(config, path, value)
    return config.lock()


@pytest.fixture
def prepare_data(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[ConfigDict], ConfigDict]:
    """Returns a function that prepares a config's dataset (generated, or from a small archive)."""

    def prepare_data(config: ConfigDict) -> ConfigDict:
        tiny.put(config, "data.name", config.data.fallback_name or config.data.name)  # needs no network
        name = config.data.name.split("/")[0]
        if name == "shapes":
            prepare = request.getfixturevalue("prepare")
            changes = {"data.dir": prepare(config.data.name), "data.train": "train[:64]", "data.test": "test[:16]"}
        else:
            assert name in MINIATURES, f"{name} needs a fixture in MINIATURES that makes its archives small"
            request.getfixturevalue(MINIATURES[name])
            changes = {"data.dir": str(tmp_path / "data"), "data.manual_dir": str(tmp_path / "manual")}
            (tmp_path / "data").mkdir()
        for path, value in changes.items():
            tiny.put(config, path, value)
        return config

    return prepare_data


def unread_keys(config: ConfigDict, workdir: Path) -> set[str]:
    """Returns the keys that a run of the config never reads by name.

    Options of modules and targets are passed as keyword arguments: the tests below check that those are used.
    """
    with key_reads.recorded_reads(config) as read:
        result = train(config, workdir)
    assert np.isfinite(result["test"]["loss"])
    read |= {"recovery.rollbacks"}  # after a bad step: see tests/training/test_recovery.py
    read |= {"data.test_fraction"}  # of tables: see tests/data/test_table_dataset.py
    read |= {"data.fold"}  # of data with folds: see tests/data/test_folds.py
    read |= {"tracking"}  # from the JSON values: see tests/tracking/test_sinks.py
    if config.data.valid:
        read |= {"data.group", "data.valid_fraction"}  # no split is held out
    for name, modality in config.data.modalities.items():
        if modality.get("triples"):
            read |= {f"data.modalities.{name}.entities"}  # the file's entities
    keyword_sections = ("model.encoders.", "model.fusion.", "data.targets.")
    return {path for path in key_reads.leaves(config) if path not in read and not path.startswith(keyword_sections)}


@pytest.mark.parametrize("task", small.TASKS)
def test_small_tasks_have_every_key_that_makes_them_small(task: str):
    config = get_config("small", f"task={task}")
    configs.check(config, devices=1)
    values = {path: functools.reduce(operator.getitem, path.split("."), config) for path in small.TASKS[task].changes}
    assert values == small.TASKS[task].changes
    for modality in config.data.modalities:  # as a unimodal baseline
        configs.check(get_config("small", f"task={task},modalities={modality}"), devices=1)


def setup_and_batches(config: ConfigDict) -> tuple[training_setup.TrainSetup, tuple[Batch, ...]]:
    configs.check(config, devices=1)
    run = configs.read(config)
    data = datasets.load(run.data, seed=run.seed, splits=("train",))
    setup = training_setup.build_setup(run, data)
    _, batches = next(read_calls(data.splits["train"], run, setup, first=0, k=1))
    return setup, batches


@pytest.mark.loop
@pytest.mark.thorough(but=STEPPED)
@pytest.mark.parametrize("name", sorted({*CONFIGS} - TRAINED))
def test_config_is_built_and_stepped(name: str, prepare_data: Any):
    setup, batches = setup_and_batches(prepare_data(shrink(get_config(name))))
    state, step = setup.init_state(0), setup.compile_train_step()
    state, metrics = step(state, batches, setup.partitioner.replicate(np.full(1, 1e-3, np.float32)))
    assert int(state.step) == 1 and np.isfinite(metrics["loss"]).all()


@pytest.mark.loop
@pytest.mark.parametrize("name", sorted({*CONFIGS} - TRAINED - STEPPED))
def test_config_is_built_and_its_step_traced_on_its_data(name: str, prepare_data: Any):
    config = prepare_data(shrink(get_config(name)))
    tiny.put(config, "parallel.mode", "jit")  # `pmap` needs to compile
    setup, (batch,) = setup_and_batches(config)
    state = setup.state_shapes()
    after, metrics = jax.eval_shape(setup.step, state, batch, np.float32(1e-3))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.loop
@pytest.mark.thorough(but=TRAINED)
@pytest.mark.parametrize("name", CONFIGS)
def test_config_trains_and_reads_every_key(name: str, prepare_data: Any, tmp_path: Path):
    config = get_config(name)
    configs.check(config, devices=1)
    config = prepare_data(shrink(config))
    configs.check(config, devices=1)
    with training_setup.shared_setups():
        assert unread_keys(config, tmp_path / "run") == set()
        if name == "quickstart":  # the thorough tests resume the others
            assert_resumes_bit_identically(config, tmp_path / "run", tmp_path / "resumed")


def assert_resumes_bit_identically(config: ConfigDict, uninterrupted: Path, workdir: Path) -> None:
    """Resumes a copy of a run as if killed after the third of four steps, which is between two validations."""
    shutil.copytree(uninterrupted, workdir)
    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "4")
    train(config, workdir)
    assert Checkpoints(workdir / "checkpoints", readonly=True).steps()[-1] == 4
    assert_same_run(workdir, uninterrupted, 4)


@pytest.mark.loop
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "arg"),
    [
        *((name, "") for name in CONFIGS if name != "quickstart"),
        ("applications", "application=surveillance"),
        ("applications", "application=recommendation"),
        ("av_digits", "objectives=ogm_ge+modality_dropout"),
        ("av_digits", "objectives=gradient_blending"),
        ("leaf", "objectives=gan+adversarial+mixup"),
        ("three_images", "tasks=label+num_informative,objectives=gradnorm"),
        ("three_images", "fusion=gat,encoder=cnn"),
        ("applications", "application=interaction"),
        ("cifar_imdb", "network=article,training=article,data=archives"),
        ("cifar_imdb", "network=deep,data=archives"),
        ("cifar_imdb", "network=article,data=archives,fusion=cross_attention"),
        ("knowledge", "triples="),
        ("audio_images", "classes=10"),
        ("vgg_text", "size=32,fusion=conv,objectives=mvae,tasks=season+gender"),
        ("vgg_text", "size=32,fusion=weighted,objectives=gan+modality_dropout"),
        ("xray_ct", "joined=False,shared=True"),
    ],
)
def test_config_arguments_resume_bit_identically(name: str, arg: str, prepare_data: Any, tmp_path: Path):
    config = prepare_data(shrink(get_config(name, arg)))
    with training_setup.shared_setups():
        train(config, tmp_path / "run")
        assert_resumes_bit_identically(config, tmp_path / "run", tmp_path / "resumed")


@pytest.mark.loop
def test_unread_keys_detect_a_planted_key(tiny_config: Callable[..., ConfigDict], tmp_path: Path):
    config = tiny_config("fusion=concat", {"steps": 1, "eval_every": 1, "checkpoint_every": 1}).unlock()
    config.planted = 1
    config.optim.schedule.planted = 2.0
    assert unread_keys(config, tmp_path) == {"planted", "optim.schedule.planted"}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_arguments_select_fusion_seed_and_modalities(name: str):
    default = get_config(name)
    for fusion in FUSIONS:
        for modality in default.data.modalities:
            config = get_config(name, f"fusion={fusion},seed=3,modalities={modality}")
            configs.check(config, devices=1)
            assert (config.model.fusion.name, config.seed) == (fusion, 3)
            assert set(config.data.modalities) == set(config.model.encoders) == {modality}
    all_modalities = "+".join(default.data.modalities)
    assert configs.to_json(get_config(name, f"modalities={all_modalities}")) == configs.to_json(default)


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_config_files_work_with_a_warning(old: str, capsys: pytest.CaptureFixture):
    warn_renamed.cache_clear()
    config = load_file(f"{ROOT}/configs/{old}.py:seed=3")
    assert capsys.readouterr().err == f"warning: configs/{old}.py is now called configs/{RENAMED[old]}.py\n"
    assert configs.to_json(config) == configs.to_json(get_config(RENAMED[old], "seed=3"))


def test_renamed_config_files_accept_the_old_task_name():
    config = get_config("three_pictures", "tasks=label+shown,objectives=uncertainty")
    new = get_config("three_images", "tasks=label+num_informative,objectives=uncertainty").unlock()
    new.data.targets.shown = new.data.targets.num_informative  # the name of its head's parameters
    del new.data.targets.num_informative
    assert configs.to_json(config) == configs.to_json(new)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files_load_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load_file(ROOT / "configs" / f"{name}.py")
    configs.check(config, devices=1)
    for options in config.data.modalities.values():
        assert Path(options.get("triples", ".")).exists()


@pytest.fixture(scope="module")
def shapes(tiny_config: Callable[..., ConfigDict]) -> datasets.Dataset:
    return datasets.load(configs.read(tiny_config()).data, seed=0, splits=("train",))


@pytest.mark.thorough(but=FIRST_OF_FAMILY)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_train_step_traces_every_fusion_strategy(
    fusion: str, tiny_config: Callable[..., ConfigDict], shapes: datasets.Dataset
):
    config = tiny_config(f"fusion={fusion}").unlock()
    config.model.encoders.text = base.encoder("text", "bow")
    config.parallel.mode = "jit"
    setup, batch = training_setup.build_setup(config, shapes), shapes.splits["train"].take(np.arange(16))
    before = setup.state_shapes()
    # Traced only, not compiled: the gate trains every strategy.
    after, metrics = jax.eval_shape(setup.step, before, batch, np.float32(0.1))
    same = lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, before, after)))
    assert {"loss", "grad_norm", "accuracy"} <= set(metrics)
    assert any(leaf.size for leaf in jax.tree.leaves(before.params))


class UnusedOption(nn.Module):
    used: int = 1
    unused: int = 2

    def __call__(self) -> int:
        return self.used


@pytest.mark.parametrize("module", [*ENCODERS.values(), *FUSIONS.values()])
def test_module_uses_every_option(module: type[nn.Module]):
    assert key_reads.unused_fields(module, module_options(module)) == set()


def test_unused_fields_detect_an_unused_option():
    assert key_reads.unused_fields(UnusedOption, module_options(UnusedOption)) == {"unused"}


@pytest.mark.parametrize("kind", modalities.MODALITY_TYPES)
def test_modality_type_module_reads_every_option(kind: str):
    module = importlib.import_module(f"mmfusion.data.{kind}")
    options = modalities.MODALITY_TYPES[kind].options
    modules = (module, preprocess, image) if kind in ("video", "images") else (module, preprocess)  # decoded by `image`
    assert set(options) - key_reads.names_read(*modules) == set()
    assert set(options.get("augment", ())) - key_reads.names_read(module, preprocess, image) == set()


@pytest.mark.parametrize("kind", targets.TARGET_OPTIONS)
def test_target_options_are_fields_of_task(kind: str):
    # The number of outputs, and how the value is decoded.
    options = set(targets.TARGET_OPTIONS[kind]) - {"classes", "encoding"}
    assert options <= {field.name for field in dataclasses.fields(Task)}


def updated_params(name: str, options: dict[str, float]) -> np.ndarray:
    """Returns a parameter after ten updates with random gradients, whose sign changes reveal every moment estimate."""
    optimizer = optim.make({"name": name, "learning_rate": 0.1, "clip_norm": 0.0, **options})
    params = jnp.ones((2, 4))
    state = optimizer.init(params)
    for gradient in np.random.default_rng(0).normal(size=(10, 2, 4)).astype(np.float32):
        update, state = optimizer.update(gradient, state, params)
        params = params + update
    return np.asarray(params)


@pytest.mark.parametrize(("name", "option"), [(name, key) for name in optim.OPTIMIZERS for key in optim.options(name)])
def test_optimizer_options_change_the_update(name: str, option: str):
    defaults = optim.options(name)
    other = {**defaults, option: defaults[option] * 0.5 + 0.05}
    assert not np.allclose(updated_params(name, other), updated_params(name, defaults), rtol=1e-5, atol=0)


def learning_rates(name: str, options: dict[str, Any]) -> list[float]:
    """Returns the learning rates of 40 steps with a score, higher is better, that is constant but for one increase."""
    config, plateau, rates = {"name": name, **options}, optim.plateau_start(), []
    for step in range(40):
        rates.append(optim.learning_rate(config, 1.0, step, 40, plateau["scale"]))
        if name == "plateau" and step % 2:
            plateau = optim.plateau_update(plateau, 0.5 + 0.001 * (step == 21), config, higher_is_better=True)
    return rates


CHANGED = {"warmup_steps": 8, "end_factor": 0.5, "boundaries": (0.2,), "factor": 0.3, "patience": 2, "min_delta": 0.1}
CHANGED["min_scale"] = 0.9


@pytest.mark.parametrize(
    ("name", "option"), [(name, key) for name in optim.SCHEDULES for key in optim.schedule_options(name)]
)
def test_schedule_options_change_the_learning_rate(name: str, option: str):
    defaults = optim.schedule_options(name)
    assert learning_rates(name, {**defaults, option: CHANGED[option]}) != learning_rates(name, defaults)
