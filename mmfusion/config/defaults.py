"""Every field of a config, with its unit. Other configs are small changes to this one."""

from typing import Any

from ml_collections import ConfigDict

from mmfusion.config.arguments import parse_arg
from mmfusion.config.choices import choice_keys
from mmfusion.config.renamed import rename_keys
from mmfusion.data.decoding import TARGET_OPTIONS
from mmfusion.data.modalities import MODALITY_TYPES
from mmfusion.errors import UserError, nearest
from mmfusion.objectives import objective_class


def get_config() -> ConfigDict:
    """Returns a locked config without modalities, encoders or targets, which every dataset brings its own of."""
    config = ConfigDict()
    config.seed = 0  # of everything random: parameters, order, dropout, augmentation
    config.steps = 1000  # optimizer updates in all
    config.batch_size = 64  # examples an update, over all devices, hosts and micro-batches
    config.eval_every = 250  # steps between validations; each is followed by a checkpoint
    config.checkpoint_every = 250  # steps between checkpoints
    config.log_every = 20  # steps between lines of metrics.jsonl
    config.select = (
        "accuracy"  # the validation metric that chooses the checkpoint to test; TASK/metric of several targets
    )

    config.deterministic = False  # the same to the bit from run to run on a GPU too, which is slower; a CPU always is

    config.data = ConfigDict()
    config.data.name = ""  # a TFDS name, or pair:FIRST+SECOND:by=label|index
    config.data.fallback_name = ""  # another name, that is taken where `name` cannot be prepared; the result says which
    config.data.dir = ""  # where datasets are prepared; empty: TFDS's own place
    config.data.manual_dir = ""  # a folder of archives fetched by hand, used before any download
    config.data.train = "train"  # TFDS split expressions
    config.data.valid = ""  # empty: carved from train
    config.data.test = "test"
    config.data.valid_fraction = 0.1  # share of train's groups that is carved off
    config.data.group = ""  # the feature whose rows must not be divided by the carve; empty: each row is its own
    config.data.memory_gb = 4.0  # a split that takes more than this once decoded is streamed
    config.data.workers = 0  # processes that read a streamed split; 0: threads
    config.data.max_bad_fraction = 0.01  # share of unreadable rows that is tolerated; they get weight 0
    config.data.missing = 0.0  # chance with which a train row loses each modality, fixed by its id; one always stays
    config.data.modalities = ConfigDict()  # name -> kind, feature, and the kind's options (mmfusion/data/modalities.py)
    config.data.targets = ConfigDict()  # task -> kind, feature, and the kind's options (mmfusion/data/decoding.py)

    config.model = ConfigDict()
    config.model.width = 64  # of tokens and fused features
    config.model.dtype = "auto"  # of computation: float32, bfloat16, or auto (bfloat16 on accelerators)
    config.model.encoders = ConfigDict()  # modality -> name and the encoder's options (mmfusion/models/encoders)
    config.model.fusion = fusion("co_attention")

    config.objectives = ConfigDict()  # name -> weight and the objective's options, beside the tasks' losses

    config.optim = optimizer("adamw", learning_rate=1e-3)

    config.recovery = ConfigDict()
    config.recovery.max_consecutive_bad_steps = 20  # in a row that go wrong, before the run goes back, or stops
    config.recovery.spike_threshold = (
        0.0  # a loss so many robust deviations above the newest 100 is wrong, too; 0: none is
    )
    config.recovery.rollbacks = 0  # times that it goes back to the checkpoint before them
    config.recovery.failed_saves = 3  # saves in a row that may fail before it stops
    config.recovery.lr_factor = 0.5  # what the learning rate is multiplied by each time

    config.parallel = ConfigDict()
    config.parallel.mode = "pmap"  # or jit, over a mesh of the same devices
    config.parallel.devices = 0  # the first so many; 0: all
    config.parallel.mesh = ConfigDict()  # of jit: data x fsdp x model are the devices
    config.parallel.mesh.data = -1  # divides the batch; -1: what the others leave
    config.parallel.mesh.fsdp = 1  # divides the batch, and parameters and the optimizer's arrays, too
    config.parallel.mesh.model = 1  # divides heads and hidden units, and what belongs to them
    config.parallel.steps_per_call = 0  # updates a compiled call; 0: 1 on CPU, up to 8 on accelerators
    return config.lock()


def modality(kind: str, feature: str, **options: Any) -> ConfigDict:
    """Returns a modality read from `feature`, with the kind's defaults changed by `options`."""
    return _filled({"kind": kind, "feature": feature, **MODALITY_TYPES[kind].options}, options)


def target(kind: str, feature: str, **options: Any) -> ConfigDict:
    """Returns a target read from `feature`, with the kind's defaults changed by `options`."""
    return _filled({"kind": kind, "feature": feature, **TARGET_OPTIONS[kind]}, options)


def encoder(modality_name: str, name: str, **options: Any) -> ConfigDict:
    """Returns the encoder `name` for a modality, with its defaults changed by `options`."""
    return _filled({"name": name, **choice_keys(f"model.encoders.{modality_name}", name)}, options)


def fusion(name: str, **options: Any) -> ConfigDict:
    """Returns the fusion strategy `name`, with its defaults changed by `options`."""
    return _filled({"name": name, **choice_keys("model.fusion", name)}, options)


def objective(name: str, **options: Any) -> ConfigDict:
    """Returns the objective `name`, with its defaults changed by `options`; it goes to `objectives.<name>`."""
    return _filled(choice_keys("objectives", name), options)


def optimizer(
    name: str, learning_rate: float, *, clip_norm: float = 1.0, accumulate: int = 1,
    schedule: str = "warmup_cosine", schedule_options: dict[str, Any] | None = None, **options: Any,
) -> ConfigDict:  # fmt: skip
    """Returns an optimizer and its schedule, with their defaults changed by the options.

    `learning_rate` is the peak; `clip_norm` bounds the global gradient norm (0: off); `accumulate` is how many
    micro-batches a batch is split into.
    """
    fixed = {"name": name, "learning_rate": learning_rate, "clip_norm": clip_norm, "accumulate": accumulate}
    result = _filled({**fixed, **choice_keys("optim", name)}, options)
    result.schedule = _filled({"name": schedule, **choice_keys("optim.schedule", schedule)}, schedule_options or {})
    return result


def begin(arg: str, fusion_name: str = "concat", **own: Any) -> tuple[ConfigDict, ConfigDict]:
    """Returns an unlocked config, and the arguments that every config takes beside its `own` (defaults by name).

    `seed`; `fusion`, a strategy; `modalities` that are kept (`image+text`; empty: all); `objectives` that are added
    with their defaults (`contrastive+mvae`); `encoders`, a folder with a run of each modality alone, named like it,
    whose encoders serve and do not learn (independent, then fused).
    """
    args = parse_arg(
        arg, **{"fusion": fusion_name, "seed": 0, "modalities": "", "objectives": "", "encoders": "", **own}
    )
    config = get_config().unlock()
    config.seed = args.seed
    config.model.fusion = fusion(args.fusion)
    return config, args


def finish(config: ConfigDict, args: ConfigDict) -> ConfigDict:
    """Returns the config, locked, with what the arguments of `begin` ask for of its modalities and objectives."""
    rename_keys(config)
    keep_modalities(config, args.modalities)
    add_objectives(config, args.objectives)
    if args.modalities:
        for name in [
            one
            for one, section in config.objectives.items()
            if objective_class(one, section).requires.modalities > len(config.model.encoders)
        ]:
            del config.objectives[name]  # it says nothing of so few
    if args.encoders:
        for name, section in config.model.encoders.items():
            if section.share:
                continue
            section.init, section.freeze = f"run:{args.encoders}/{name}", 10**9  # whatever the steps
    return config.lock()


def keep_modalities(config: ConfigDict, names: str) -> None:
    """Keeps the modalities in `names` (`image+text`; empty: all), in place."""
    if not names:
        return
    kept = names.split("+")
    for name in kept:
        if name not in config.data.modalities:
            raise UserError(f"config argument modalities={names!r}: {nearest(name, config.data.modalities)}")
    with config.unlocked():
        for name in [m for m in config.data.modalities if m not in kept]:
            del config.data.modalities[name]
        encoders = {name: section.copy_and_resolve_references() for name, section in config.model.encoders.items()}
        config.model.encoders = ConfigDict()
        reader = {}  # of each encoder that is left, the modality that has it now
        for name, section in encoders.items():
            left = [m for m in (name, *section.join) if m in kept]  # whichever is left has the encoder
            left += [m for m, other in encoders.items() if other.share == name and m in kept]
            if left and not section.share:
                section.join = tuple(m for m in left[1:] if m in section.join)
                config.model.encoders[left[0]] = section
                reader[name] = left[0]
        for name, section in encoders.items():
            if section.share and name in kept and reader[section.share] != name:
                section.share = reader[section.share]
                config.model.encoders[name] = section


def add_tasks(config: ConfigDict, names: str) -> None:
    """Adds a target for each feature named by `label+shown`, all classes; validation chooses by the first."""
    tasks = names.split("+")
    if len(set(tasks)) < len(tasks):
        raise UserError(f"config argument tasks={names!r} names one twice")
    for task in tasks:
        config.data.targets[task] = target("classification", task)
    config.select = "accuracy" if len(tasks) == 1 else f"{tasks[0]}/accuracy"


def add_objectives(config: ConfigDict, names: str) -> None:
    """Adds the objectives named by `contrastive+mvae` to a config, with their defaults; empty adds none."""
    with config.unlocked():
        for name in filter(None, names.split("+")):
            config.objectives[name] = objective(name)


def _filled(defaults: dict[str, Any], changes: dict[str, Any]) -> ConfigDict:
    unknown = set(changes) - set(defaults)
    if unknown:
        owner = defaults.get("name") or defaults.get("kind", "an objective")
        raise UserError(f"option {min(unknown)!r} of {owner!r}: {nearest(min(unknown), defaults)}")
    return ConfigDict({**defaults, **changes})
