"""Every key of a config: its type, default, unit, meaning and allowed values.

`defaults.get_config` builds the ConfigDict that users edit from these declarations, `check` takes types and ranges from
them, `reference` the table in `configs/README.md`, and `read` returns them filled from a ConfigDict.

The options of an encoder, strategy, objective, optimizer, schedule, modality or target are declared where it is.
"""

# ruff: noqa: RUF009 (the helpers return dataclass fields)
import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, cast

from ml_collections import ConfigDict

from mmfusion.config.keys import Choice, Options, entries, key, key_of, options, section, section_of
from mmfusion.distributed.mesh import MODES


@dataclasses.dataclass(frozen=True)
class ModalityConfig(Choice):
    """One modality of the data."""

    kind: str = key("", "the modality type")
    feature: str = key("", "the dataset's feature that holds it; several joined by +")
    options: Options = options("what the modality type reads, see `mmfusion/data/modalities.py`")


@dataclasses.dataclass(frozen=True)
class TargetConfig(Choice):
    """One task."""

    kind: str = key("", "the type of target")
    feature: str = key("", "the dataset's feature that holds the target")
    options: Options = options("what the type of target reads, see `mmfusion/data/decoding.py`")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The dataset, its splits, and what is read from it."""

    name: str = key(
        "", "a TFDS name, pair:FIRST+SECOND:by=label|index, package.module:Class of a TFDS builder, or a table's path"
    )
    fallback_name: str = key("", "the dataset to use where `name` cannot be prepared; the result says which was used")
    dir: str = key("", "where datasets are prepared; empty: TFDS's default", resume="resource")
    manual_dir: str = key("", "folder of archives fetched by hand, used before any download", resume="resource")
    train: str = key("train", "TFDS split expression of the training split")
    valid: str = key("", "TFDS split expression of the validation split; empty: held out from train")
    test: str = key("test", "TFDS split expression of the test split")
    valid_fraction: float = key(0.1, "share of train's groups that is held out for validation", below=1)
    test_fraction: float = key(0.2, "share held out as test: of a table's groups, or of the rows by `time`", below=1)
    group: str = key(
        "",
        "rows with the same value of this feature stay together where rows are held out for valid or test; empty: each "
        "row by itself, of a pair those with the same second row together",
    )
    folds: int = key(0, "folds that train is divided into by class and `group`; one is the test split; 0: none")
    fold_by: str = key("", "a feature whose values are the folds: `fold`, or to leave one group out `group`")
    fold: int = key(0, "the fold that is the test split: its number from 0 on, or its whole-number value in `fold_by`")
    time: str = key("", "a feature, dates or numbers: the latest rows of train are the test split, those before valid")
    memory_gb: float = key(4.0, "a larger split is streamed, unless it is in `cache`", unit="GB", resume="resource")
    workers: int = key(0, "processes that read a streamed split; 0: threads", resume="resource")
    cache: str = key(
        "auto", "keeps what takes over 5 s to decode; auto: in ~/.cache/mmfusion/rows; off: nowhere", resume="resource"
    )
    cache_dtype: str = key(
        "float32", "of the features of frozen encoders in `cache`", choices=("float32", "bfloat16", "float16")
    )
    cache_views: int = key(0, "augmented views of a training row whose features are in `cache`; 0: none are")
    max_bad_fraction: float = key(0.01, "share of unreadable rows that is tolerated; they get weight 0", below=1)
    allow_leakage: bool = key(False, "accept a target among the inputs, and splits that have rows in common")
    missing: float = key(
        0.0, "probability that a training row loses each modality, fixed by its id; one modality always stays", below=1
    )
    missing_in: str = key("", "the modalities that `missing` is about, joined by +; empty: all")
    sampler: str = key(
        "uniform",
        "how training rows are drawn; balanced: equally many of every class in a batch, with replacement",
        choices=("uniform", "balanced"),
    )
    weight_feature: str = key("", "a numeric feature: each row's weight in the losses, in no other metric; empty: 1")
    modalities: Mapping[str, ModalityConfig] = entries("the modalities, by name", ModalityConfig, of="modality")
    targets: Mapping[str, TargetConfig] = entries("the tasks, by name", TargetConfig, of="task")


@dataclasses.dataclass(frozen=True)
class EncoderConfig(Choice):
    """The encoder of one modality."""

    name: str = key("", "the encoder, see `mmfusion/models/encoders`")
    init: str = key("", "initial weights: a safetensors file, folder or hub id, or run:WORKDIR; empty: random")
    freeze: int = key(0, "steps in which it is not updated; at least `steps`: never updated", unit="steps")
    layer_decay: float = key(1.0, "factor of the learning rate from each layer to the one before", above=0, maximum=1)
    share: str = key("", "another modality, whose encoder and weights read this one, too")
    join: tuple[str, ...] = key(
        (), "other modalities of the same size, whose channels it reads beside its own; they have no encoder"
    )
    options: Options = options("what the encoder reads")


@dataclasses.dataclass(frozen=True)
class FusionConfig(Choice):
    """The fusion strategy."""

    name: str = key("co_attention", "the strategy, see `mmfusion/models/fusion`")
    options: Options = options("what the strategy reads")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Encoders and fusion."""

    width: int = key(64, "width of tokens and fused features", minimum=1)
    dtype: str = key(
        "auto", "dtype of the computation; auto: bfloat16 on accelerators, float32 on a CPU",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    encoders: Mapping[str, EncoderConfig] = entries("the encoders, by modality", EncoderConfig, of="modality")
    fusion: FusionConfig = section(FusionConfig, "the fusion strategy")


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Choice):
    """The learning-rate schedule."""

    name: str = key("warmup_cosine", "the schedule")
    options: Options = options("what the schedule reads, see `mmfusion/optim/schedules.py`")


@dataclasses.dataclass(frozen=True)
class OptimConfig(Choice):
    """The optimizer and its schedule."""

    name: str = key("adamw", "the optimizer")
    learning_rate: float = key(1e-3, "peak learning rate", above=0)
    clip_norm: float = key(
        1.0,
        "bound of the gradient norm: of the model, of auxiliary modules and probes, and of frozen encoders, each by "
        "its own norm; 0: no clipping",
    )
    accumulate: int = key(1, "micro-batches that a batch is split into", minimum=1)
    schedule: ScheduleConfig = section(ScheduleConfig, "the learning-rate schedule")
    options: Options = options(
        "what the optimizer reads, see `mmfusion/optim/optimizers.py`; `weight_decay` is multiplied by the learning "
        "rate: a step takes the share learning_rate × weight_decay of kernels and embeddings, so that it matters only "
        "where steps × learning_rate × weight_decay is not far below 1"
    )


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """What is done about steps and saves that fail."""

    max_consecutive_bad_steps: int = key(
        20, "bad steps in a row after which the run rolls back, or stops", unit="steps", minimum=1, resume="recovery"
    )
    spike_threshold: float = key(
        0.0, "a loss this many robust deviations above the last 100 is a bad step, too; 0: off"
    )
    rollbacks: int = key(0, "how often the run may roll back to an earlier checkpoint", resume="recovery")
    failed_saves: int = key(3, "failed saves in a row that are tolerated", resume="recovery")
    lr_factor: float = key(
        0.5, "factor of the learning rate after each rollback", above=0, maximum=1, resume="recovery"
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The mesh of `parallel.mode=jit`: data × fsdp × model are the devices."""

    data: int = key(-1, "devices that divide the batch; -1: all that the other axes leave", minimum=-1)
    fsdp: int = key(1, "devices that divide the batch, parameters and optimizer state", minimum=1)
    model: int = key(1, "devices that divide heads and hidden units", minimum=1)


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over devices."""

    mode: str = key("auto", "pmap, jit, or auto: pmap on one host and jit on several", choices=MODES, resume="recovery")
    devices: int = key(0, "use the first so many devices; 0: all", resume="resource")
    mesh: MeshConfig = section(MeshConfig, "the mesh of mode jit")
    steps_per_call: int = key(0, "steps of one compiled call; 0: 1 on a CPU, up to 8 on accelerators", unit="steps")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    seed: int = key(0, "seed of everything random: parameters, order, dropout, augmentation", maximum=2**32 - 1)
    steps: int = key(1000, "optimizer updates in all", unit="steps", minimum=1)
    batch_size: int = key(
        64, "examples of an update, over all devices, hosts and micro-batches", unit="examples", minimum=1
    )
    eval_every: int = key(250, "steps between validations; each is followed by a checkpoint", unit="steps", minimum=1)
    checkpoint_every: int = key(250, "steps between checkpoints", unit="steps", minimum=1)
    log_every: int = key(20, "steps between lines of metrics.jsonl", unit="steps", minimum=1)
    select: str = key(
        "accuracy",
        "validation metric that selects the checkpoint to test; TASK/metric of several tasks; last: the newest one",
    )
    early_stopping: int = key(
        0, "validations in a row without a better value of `select` after which training ends; 0: off",
        unit="validations",
    )  # fmt: skip
    tracking: str = key("tensorboard", "sinks of metrics: tensorboard, wandb, mlflow, joined by +", resume="resource")
    deterministic: bool = key(False, "bitwise reproducible on a GPU, too, which is slower; a CPU always is")
    data: DataConfig = section(DataConfig, "the dataset")
    model: ModelConfig = section(ModelConfig, "the model")
    objectives: Mapping[str, Options] = entries("options of an objective beside the tasks' losses", of="objective")
    optim: OptimConfig = section(OptimConfig, "the optimizer")
    recovery: RecoveryConfig = section(RecoveryConfig, "bad steps and failed saves")
    parallel: ParallelConfig = section(ParallelConfig, "devices")


def read(config: ConfigDict) -> RunConfig:
    """Returns a checked config as typed dataclasses; a key that it lacks is at its default."""
    return _read(RunConfig, cast(Mapping[str, Any], config))


def _read(cls: type, source: Mapping[str, Any]) -> Any:
    values, known = {}, {field.name for field in dataclasses.fields(cls)}
    for field in dataclasses.fields(cls):
        if field.metadata.get("options"):
            values[field.name] = _options(source, set(source) - known)
        elif field.name not in source:
            continue
        elif key_of(field):
            value = source[field.name]
            kind = type(field.default)  # a whole number may stand for a float, and a list for a tuple
            values[field.name] = kind(value) if kind in (float, tuple) else value
        elif inner := section_of(field):
            values[field.name] = _read(inner, source[field.name])
        else:
            inner = field.metadata["entries"]
            values[field.name] = {
                name: _read(inner, entry) if inner else _options(entry, set(entry))
                for name, entry in source[field.name].items()
            }
    return cls(**values)


def _options(source: Mapping[str, Any], names: Collection[str]) -> Options:
    """Returns the named values of a section as a plain dict; nested sections are dicts, too."""
    values = {name: source[name] for name in sorted(names)}
    return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in values.items()}
