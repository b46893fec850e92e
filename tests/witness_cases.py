"""The cases of `tests/witness.py`: minimal command lines of `python -m experiments.train`.

All paths and values are literal and independent of the package, so that the cases stay the same while it changes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Changes = Mapping[str, Any]  # dotted config path -> value; None keeps the config's value


@dataclasses.dataclass(frozen=True)
class Case:
    """A run of the command line, with runs before it and an optional resumption.

    Attributes:
      name: `group/what/how`.
      config: the text after `--config=configs/`; `{before}` is replaced by the directory of the runs `before`.
      changes: overrides of the config, see `Changes`.
      devices: number of CPU devices.
      archives: whether its data comes from manually downloaded archives.
      resume: step of the checkpoint to resume from after the run, as after a kill; 0 for none.
      before: directory -> config and changes of a run that is executed first.
    """

    name: str
    config: str
    changes: Changes
    devices: int = 1
    archives: bool = False
    resume: int = 0
    before: Mapping[str, tuple[str, Changes]] = dataclasses.field(default_factory=dict)


COMMON: Changes = {
    "steps": 20,
    "batch_size": 16,
    "eval_every": 10,
    "checkpoint_every": 10,
    "log_every": 1,
    "data.train": "train[:256]",
    "data.test": "test[:64]",
    "model.width": 8,
    "model.dtype": "float32",
    "optim.schedule.warmup_steps": 5,
}
OFFICIAL_VALID = {"data.valid": "valid[:64]"}  # for datasets with a validation split
ACCUMULATE = {"optim.accumulate": 2}
MISSING = {"data.missing": 0.3}
DROPOUT = {"model.fusion.dropout": 0.1}
THREE = ("gray", "colour", "deep")
RNN = {"hidden": 8, "embedding": 8}


def for_encoder(modality: str, **options: Any) -> Changes:
    """Returns changes to the options of a modality's encoder."""
    return {f"model.encoders.{modality}.{name}": value for name, value in options.items()}


TINY: Changes = {
    "data.modalities.text.length": 8,
    **for_encoder("image", channels=(4, 8), strides=(4, 2)),
    **for_encoder("text", name="bow", tokens="all", dropout=0.1),
}
IMAGES: Changes = {key: value for m in THREE for key, value in for_encoder(m, channels=(4, 4), dropout=0.1).items()}
CELLS: Changes = {key: value for m in THREE for key, value in for_encoder(m, channels=(4,), strides=(4,)).items()}
AUDIO: Changes = {"data.modalities.audio.seconds": 0.2, **for_encoder("audio", channels=(4, 4, 4))}
EVENTS = for_encoder("behaviour", hidden=8, heads=2, layers=1, dropout=0.1)
SMALL_IMAGE = for_encoder("image", channels=(4, 4, 4))

# Config -> changes, and whether its data comes from archives.
CONFIGS: dict[str, tuple[Changes, bool]] = {
    "quickstart": (
        {**for_encoder("image", channels=(4, 4, 8)), **for_encoder("text", **RNN, dropout=0.1), **DROPOUT},
        False,
    ),
    "applications:application=medical_notes": ({**SMALL_IMAGE, **for_encoder("notes", **RNN)}, False),
    "applications:application=surveillance": ({**AUDIO, **for_encoder("video", channels=(4, 4, 4))}, False),
    "applications:application=recommendation": ({**SMALL_IMAGE, **for_encoder("text", **RNN), **EVENTS}, False),
    "applications:application=interaction": (
        {
            **SMALL_IMAGE,
            **for_encoder("text", **RNN),
            **for_encoder("speech", channels=(4, 4, 4)),
            "data.modalities.speech.seconds": 0.2,
        },
        False,
    ),
    "av_digits": ({**AUDIO, **SMALL_IMAGE, **for_encoder("audio", mask_frames=3, mask_bands=5)}, True),
    "cifar_imdb:data=archives": ({**SMALL_IMAGE, **for_encoder("text", **RNN)}, True),
    "digit_views": (
        {key: value for m in ("fou", "zer", "mor") for key, value in for_encoder(m, hidden=(8,)).items()},
        True,
    ),
    "easy_vqa": ({**SMALL_IMAGE, **for_encoder("text", **RNN), **DROPOUT}, True),
    "fashion": ({**SMALL_IMAGE, **for_encoder("text", **RNN), **OFFICIAL_VALID}, True),
    "knowledge": (
        {**SMALL_IMAGE, **for_encoder("text", **RNN), **for_encoder("knowledge", hidden=8, heads=2, layers=1)},
        False,
    ),
    "leaf": ({**SMALL_IMAGE, **for_encoder("table", hidden=(8,)), **OFFICIAL_VALID}, True),
    "sound_pictures": (
        {
            "data.modalities.audio.seconds": 0.1,
            "data.modalities.image.size": (64, 64),
            **for_encoder("audio", channels=(4, 4, 4, 4, 4)),
            **for_encoder("small", channels=(4, 4, 4)),
            **for_encoder("image", channels=(4, 4, 4, 4)),
            **for_encoder("text", **RNN),
        },
        False,
    ),
    "tfds:text=sentence": ({**SMALL_IMAGE, **for_encoder("text", **RNN)}, False),
    "three_pictures": (IMAGES, False),
    "vgg_text:size=32": ({**for_encoder("image", channels=2), **for_encoder("text", dense=8), **OFFICIAL_VALID}, True),
    "xray_ct:size=32": (for_encoder("xray", channels=(4, 4), hidden=8), False),
}

# Objective -> further changes, for runs on image and text.
ON_IMAGE_AND_TEXT: dict[str, Changes] = {
    "contrastive": MISSING,
    "cca": MISSING,
    "adversarial": MISSING,
    "mvae": MISSING,
    "mmvae": MISSING,
    "gan": MISSING,
    "unimodal": MISSING,
    "ogm_ge": MISSING,
    "mmpareto": MISSING,
    "gradient_blending": MISSING,
    "mixup": MISSING,
    "modality_dropout": {},
}
# Objective -> tasks and further changes, for runs on three images.
ON_IMAGES: dict[str, tuple[str, Changes]] = {
    "mixup": ("label", {"objectives.mixup.where": "input"}),
    "cutmix": ("label", {}),
    "uncertainty": ("label+shown", {}),
    "gradnorm": ("label+shown", {}),
    "gradient_blending": ("label+shown", {}),
}
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "lion")
SCHEDULES: dict[str, Changes] = {
    "constant": {"optim.schedule.warmup_steps": 3},
    "step": {"optim.schedule.warmup_steps": None, "optim.schedule.boundaries": (0.25, 0.5)},
    "plateau": {"optim.schedule.patience": 1, "optim.schedule.min_delta": 0.5, "eval_every": 5},
}
FUSIONS = (
    "mean", "sum", "max", "product", "weighted", "attention_pool", "gmu", "embracenet", "squeeze_excite", "conv",
    "channel_multiply", "tensor", "low_rank_tensor", "multiplicative", "mcb", "mlb", "mfb", "mfh", "mutan", "block",
    "film", "nl_gate", "mag", "cross_attention", "co_attention", "merged_attention", "mult", "bottleneck", "perceiver",
    "qformer", "bilinear_attention", "late_transformer", "gat", "knowledge_graph", "central", "deepsets", "late_mean",
    "late_weighted", "product_of_experts", "moe", "stacking", "tmc", "qmf", "i2m2",
)  # fmt: skip


def case(name: str, config: str, *changes: Changes, **options: Any) -> Case:
    """Returns a case of `COMMON` with changes, of which later ones take precedence."""
    merged = {key: value for part in (COMMON, *changes) for key, value in part.items()}
    return Case(name, config, merged, **options)


def both(name: str, config: str, *changes: Changes, **options: Any) -> Iterator[Case]:
    """Yields a case on one device with two micro-batches, and on eight devices."""
    yield case(f"{name}/accumulate", config, *changes, ACCUMULATE, **options)
    yield case(f"{name}/devices", config, *changes, devices=8, **options)


def quickstart(name: str, arg: str = "fusion=concat", *changes: Changes, **options: Any) -> Case:
    """Returns a case of the smallest run, on image and text: `TINY` with changes."""
    return case(name, f"quickstart:{arg}", TINY, *changes, **options)


def three_images(name: str, arg: str, *changes: Changes, **options: Any) -> Case:
    """Returns a case of three images with missing modalities."""
    return case(name, f"three_pictures:{arg}", IMAGES, MISSING, *changes, **options)


def cases() -> list[Case]:
    """Returns all cases, the most informative first."""
    groups = (_configs, _objectives, _combined, _resumed, _encoders, _optim, _parallel, _data, _recovery, _fusions)
    result = [one for group in (*groups, _more_encoders) for one in group()]
    names = [one.name for one in result]
    assert len(set(names)) == len(names), "two cases have one name"
    return result


def _configs() -> Iterator[Case]:
    pairs = [
        both(f"config/{config}", config, changes, archives=archives) for config, (changes, archives) in CONFIGS.items()
    ]
    on_one, on_eight = zip(*pairs, strict=True)
    yield from on_one
    yield from on_eight


def _objectives() -> Iterator[Case]:
    for name, changes in ON_IMAGE_AND_TEXT.items():
        yield from both(f"objective/{name}", f"quickstart:fusion=concat,objectives={name}", TINY, changes)
    for name, (tasks, changes) in ON_IMAGES.items():
        config = f"three_pictures:tasks={tasks},objectives={name}"
        yield from both(f"objective/{name} of pictures", config, IMAGES, MISSING, changes)
    for loss in ("focal", "emd", "mse"):
        changes = {"data.targets.label.loss": loss, "data.targets.label.class_weights": (1.0, 3.0)}
        yield quickstart(f"objective/loss {loss}", "fusion=concat", changes, ACCUMULATE)
    for loss in ("mse", "mae", "huber"):
        target = {"kind": "regression", "feature": "label", "loss": loss, "weight": 2.0}
        changes = {"data.targets.label": target, "select": "rmse"}
        yield quickstart(f"objective/regression {loss}", "fusion=concat,objectives=unimodal", changes, ACCUMULATE)
    smoothed = {"data.targets.label.label_smoothing": 0.1, "data.targets.label.class_weights": (1.0, 0.5)}
    yield quickstart("objective/smoothed", "fusion=concat,objectives=mixup+ogm_ge", smoothed, ACCUMULATE)
    options = {"objectives.ogm_ge.noise": False, "objectives.ogm_ge.until": 10}
    yield quickstart("objective/ogm_ge until", "fusion=concat,objectives=ogm_ge", options, MISSING)


def _combined() -> Iterator[Case]:
    all_objectives = "gradnorm+ogm_ge+unimodal+mixup+modality_dropout+mvae"
    weights = {
        "data.targets.shown.weight": 0.5,
        "data.targets.label.label_smoothing": 0.1,
        "objectives.mvae.weight": 0.3,
        "objectives.unimodal.weight": 0.7,
    }
    # The learning rate is so low that the loss stays above the spike threshold.
    spike = {"recovery.spike": 0.3, "steps": 40, "optim.learning_rate": 2e-4}
    yield from both(
        "together/everything",
        f"three_pictures:tasks=label+shown,objectives={all_objectives}",
        IMAGES, MISSING, weights, spike, {"recovery.updates": 10},
    )  # fmt: skip
    yield from both(
        "together/gradnorm and gradient_blending",
        "three_pictures:tasks=label+shown,objectives=gradnorm+gradient_blending+mvae",
        IMAGES, MISSING, {"data.targets.shown.weight": 0.5}, {"eval_every": 5},
    )  # fmt: skip
    yield from both(
        "together/uncertainty and gradient_blending",
        "three_pictures:tasks=label+shown,objectives=uncertainty+gradient_blending+modality_dropout",
        IMAGES, MISSING, {"eval_every": 5},
    )  # fmt: skip
    number = {"kind": "regression", "feature": "num_informative", **_NUMBER}
    yield from both(
        "together/a class and a number",
        "three_pictures:tasks=label+shown,objectives=uncertainty+unimodal+contrastive",
        IMAGES, MISSING, {"data.targets.shown": number},
    )  # fmt: skip
    yield three_images(
        "together/late, two tasks", "tasks=label+shown,fusion=late_mean,objectives=uncertainty", ACCUMULATE
    )
    yield three_images("together/three objectives", "objectives=contrastive+adversarial+gan", ACCUMULATE)
    for fusion in ("late_mean", "tmc", "moe"):
        for objective in ("ogm_ge", "unimodal", "gradient_blending", "ogm_ge+unimodal+mixup"):
            if (fusion, objective) != ("tmc", "gradient_blending"):
                arg = f"fusion={fusion},objectives={objective}"
                yield quickstart(f"together/{fusion}+{objective}", arg, MISSING, ACCUMULATE)
        arg = f"fusion={fusion},objectives=ogm_ge+unimodal"
        yield quickstart(f"together/{fusion} on devices", arg, MISSING, devices=8)


def _resumed() -> Iterator[Case]:
    between = {"checkpoint_every": 7}
    # One of the two newest checkpoints, which are kept, must be between two validations.
    often = {"eval_every": 5, "checkpoint_every": 9}
    blending = "tasks=label+shown,objectives=gradient_blending+gradnorm"
    plateau = {"optim.schedule.name": "plateau", **SCHEDULES["plateau"]}
    spike = {"recovery.spike": 1.0, "steps": 40}
    yield quickstart("resumed/plain", "fusion=co_attention,objectives=modality_dropout", between, ACCUMULATE, resume=14)
    yield quickstart("resumed/on devices", "fusion=concat,objectives=mixup+ogm_ge", between, devices=8, resume=14)
    yield three_images("resumed/heads and tasks weighed", blending, often, ACCUMULATE, resume=18)
    yield quickstart("resumed/plateau", "fusion=concat", plateau, often, resume=18)
    yield quickstart("resumed/spikes", "fusion=concat", spike, {"checkpoint_every": 35}, resume=35)
    fsdp = {"parallel.mode": "jit", "parallel.mesh.fsdp": 2}
    yield quickstart("resumed/fsdp", "fusion=concat", between, fsdp, devices=8, resume=14)


def _encoders() -> Iterator[Case]:
    for steps in (8, 10**9):
        freeze = for_encoder("image", freeze=steps)
        yield from both(f"encoder/frozen for {steps}", "quickstart:fusion=concat,objectives=unimodal", TINY, freeze)
    decay = for_encoder("image", layer_decay=0.5)
    yield from both("encoder/layer_decay", "quickstart:fusion=concat", TINY, decay, for_encoder("image", freeze=5))
    two_images = "xray_ct:size=32,joined=False"
    small = for_encoder("xray", channels=(4, 4), hidden=8)
    yield from both("encoder/shared", f"{two_images},shared=True", small, MISSING)
    yield case(
        "encoder/shared and held back", f"{two_images},shared=True,objectives=ogm_ge", small, MISSING, ACCUMULATE
    )
    yield from both("encoder/apart", two_images, small, for_encoder("ct", channels=(4, 4), hidden=8), MISSING)
    moved = {f"data.modalities.{m}.augment.crop": 4 for m in ("xray", "ct")}
    yield from both("encoder/joined", "xray_ct:size=32", small, MISSING, moved)
    resnet = {**for_encoder("image", name="resnet18", norm="batch", channels=4), "data.modalities.image.size": (16, 16)}
    yield from both("encoder/resnet18 with batch norm", "quickstart:fusion=concat", {**TINY, **_without_cnn()}, resnet)
    unimodal = {
        name: (f"quickstart:fusion=concat,modalities={name}", _unimodal_changes(name)) for name in ("image", "text")
    }
    yield quickstart("encoder/from runs", "fusion=concat,encoders={before}", before=unimodal)
    init = for_encoder("image", init="run:{before}/image", freeze=10)
    image = {"image": unimodal["image"]}
    yield quickstart("encoder/from a run, learning later", "fusion=concat", init, before=image)


def _unimodal_changes(modality: str) -> Changes:
    """Returns the changes of the smallest run that apply to this modality."""
    other = {"image": ".text.", "text": ".image."}[modality]
    return {key: value for key, value in {**COMMON, **TINY}.items() if other not in key}


def _without_cnn() -> Changes:
    return {key: None for key in TINY if key.startswith("model.encoders.image.")}


def _optim() -> Iterator[Case]:
    for name in OPTIMIZERS:
        learning_rate = {"optim.learning_rate": 0.03 if name in ("sgd", "momentum") else 3e-3}
        changes = {"optim.name": name, **learning_rate} | ({} if name == "adam" else {"optim.weight_decay": 0.01})
        yield quickstart(f"optim/{name}", "fusion=concat", changes, ACCUMULATE)
    for name, changes in SCHEDULES.items():
        yield quickstart(f"optim/schedule {name}", "fusion=concat", {"optim.schedule.name": name, **changes})
    yield quickstart("optim/schedule end_factor", "fusion=concat", {"optim.schedule.end_factor": 0.3})
    yield quickstart(
        "optim/clipped", "fusion=concat,objectives=mvae", {"optim.clip_norm": 0.1}, for_encoder("image", freeze=8)
    )
    yield quickstart("optim/not clipped", "fusion=concat", {"optim.clip_norm": 0.0}, ACCUMULATE)
    yield quickstart("optim/select loss", "fusion=concat", {"select": "loss", "eval_every": 5})


def _parallel() -> Iterator[Case]:
    jit = {"parallel.mode": "jit"}
    meshes = {
        "jit": {},
        "jit fsdp=2": {"parallel.mesh.fsdp": 2},
        "jit model=2": {"parallel.mesh.model": 2},
        "jit fsdp=2 model=2": {"parallel.mesh.fsdp": 2, "parallel.mesh.model": 2},
    }
    for name, mesh in meshes.items():
        yield quickstart(f"parallel/{name}", "fusion=co_attention", jit, mesh, MISSING, devices=8)
    arg = "fusion=concat,objectives=mixup+ogm_ge+mvae"
    two = {**ACCUMULATE, "batch_size": 32}
    yield quickstart("parallel/jit with objectives", arg, jit, two, MISSING, devices=8)
    yield quickstart("parallel/jit fsdp=2 with objectives", arg, jit, meshes["jit fsdp=2"], two, MISSING, devices=8)
    yield quickstart("parallel/jit on one device", arg, jit, ACCUMULATE)
    yield quickstart("parallel/pmap with micro-batches", arg, two, MISSING, devices=8)
    yield quickstart("parallel/four of eight devices", "fusion=concat", {"parallel.devices": 4}, devices=8)
    for devices in (1, 8):
        changes = {"parallel.steps_per_call": 5}
        yield quickstart(f"parallel/five steps a call on {devices}", arg, changes, devices=devices)
    batch = {**for_encoder("image", norm="batch"), "parallel.mode": "jit"}
    yield quickstart("parallel/jit with batch norm", "fusion=concat", batch, devices=8)


def _data() -> Iterator[Case]:
    yield from both("data/missing", "quickstart:fusion=co_attention", TINY, MISSING)
    streamed = {"data.memory_gb": 0.0}
    yield quickstart("data/streamed", "fusion=concat", streamed, MISSING)
    yield quickstart("data/streamed by two workers", "fusion=concat", streamed, {"data.workers": 2})
    moved = {
        **{f"data.modalities.image.augment.{name}": 0.3 for name in ("flip", "brightness", "contrast", "saturation")},
        "data.modalities.image.augment.crop": 3,
        "data.modalities.image.augment.rotate": 15.0,
        "data.modalities.text.augment.drop": 0.2,
    }
    yield from both("data/augmented", "quickstart:fusion=concat", TINY, moved)
    yield quickstart(
        "data/bpe",
        "fusion=concat",
        {"data.modalities.text.tokenizer": "bpe", "data.modalities.text.vocabulary_size": 280},
    )
    yield quickstart("data/another seed", "fusion=concat,seed=7", MISSING)
    yield quickstart("data/whole split", "fusion=concat", {"data.train": "train[:5%]", "batch_size": 64})
    yield quickstart("data/bfloat16", "fusion=co_attention", {"model.dtype": "bfloat16"})
    for variant in ("relations", "redundant"):
        yield quickstart(f"data/{variant}", f"fusion=concat,variant={variant}")
    unimodal = {"image": "fusion=concat,modalities=image", "text": "fusion=concat,modalities=text"}
    for name, arg in unimodal.items():
        yield case(f"data/{name} alone", f"quickstart:{arg}", _unimodal_changes(name), ACCUMULATE)
    graph = {
        "data.modalities.mor": {
            "kind": "graph",
            "feature": "mor+mor",  # six nodes with one feature, and a matrix of the same values
            "nodes": 6,
            "features": 1,
            "edges": "matrix",
        },
        **for_encoder("fou", hidden=(8,)),
    }
    config = "digit_views:modalities=fou+mor,fusion=concat"
    for encoder, hidden in (("gcn", (8, 8)), ("graph_attention", 8)):
        changes = {**graph, **for_encoder("mor", name=encoder, hidden=hidden)}
        yield from both(f"data/graph by {encoder}", config, changes, archives=True)
    article = "cifar_imdb:network=article,data=archives"
    yield case(
        "data/paired",
        article,
        for_encoder("image", channels=(4, 4)),
        for_encoder("text", **RNN),
        MISSING,
        archives=True,
    )
    audio = {**AUDIO, **for_encoder("audio", channels=(4,) * 5), **SMALL_IMAGE}
    yield case("data/resampled", "sound_pictures:classes=10", audio, archives=True)
    yield case("data/co-occurrences", "knowledge:triples=", CONFIGS["knowledge"][0], ACCUMULATE)


def _recovery() -> Iterator[Case]:
    spike = {"recovery.spike": 0.5, "steps": 40}
    yield quickstart("recovery/spikes", "fusion=concat", spike, ACCUMULATE)
    yield quickstart("recovery/spikes on devices", "fusion=concat", spike, devices=8)
    back = {"recovery.updates": 2, "recovery.rollbacks": 2, "checkpoint_every": 5}
    yield quickstart("recovery/back, and given up", "fusion=concat", spike, back, {"recovery.spike": 0.01})
    # The learning rate increases until the loss diverges; after the rollback a small factor of it converges.
    grows = {"optim.schedule.name": "step", "optim.schedule.warmup_steps": None, "optim.schedule.factor": 1000.0}
    grows |= {"optim.schedule.boundaries": (20,), "optim.name": "sgd", "optim.learning_rate": 0.01}
    calm = {"optim.clip_norm": 0.0, "recovery.spike": 5.0, "recovery.lower": 0.001}
    yield quickstart("recovery/back", "fusion=concat", spike, back, grows, calm)
    yield quickstart("recovery/back on devices", "fusion=concat", spike, back, grows, calm, devices=8)
    hot = {"optim.name": "sgd", "optim.learning_rate": 1e30, "optim.clip_norm": 0.0, "recovery.updates": 4}
    yield quickstart("recovery/not finite", "fusion=concat", hot)


def _fusions() -> Iterator[Case]:
    for fusion in FUSIONS:
        yield quickstart(f"fusion/{fusion}", f"fusion={fusion}", MISSING)


def _more_encoders() -> Iterator[Case]:
    """Yields encoders that no other case has, except those that compile for minutes."""
    size = {"data.modalities.image.size": (32, 32), **_without_cnn()}
    options = {"vit_ti": {"layers": 2, "hidden": 24, "heads": 3}, "convnext_t": {"channels": 4}}
    for name in ("pooled_cnn", "cnn_rnn", "lenet5", "vit_ti", "convnext_t"):
        changes = for_encoder("image", name=name, **options.get(name, {}))
        yield quickstart(f"encoder/{name}", "fusion=concat", size, changes)
    text = {key: None for key in TINY if key.startswith("model.encoders.text.")}
    for name in ("textcnn", "rnn", "transformer"):
        yield quickstart(f"encoder/{name}", "fusion=concat", text, for_encoder("text", name=name))
    yield case(
        "encoder/cnn3d",
        "applications:application=surveillance",
        AUDIO,
        for_encoder("video", name="cnn3d", channels=(4, 4, 4)),
    )
    views = {key: value for m in ("fou", "zer", "mor") for key, value in for_encoder(m, hidden=(8,)).items()}
    table = {
        **views,
        "model.encoders.mor.hidden": None,
        **for_encoder("mor", name="ft_transformer", hidden=8, heads=2, layers=1),
    }
    yield case("encoder/ft_transformer", "digit_views:fusion=concat", table, archives=True)


def few_cases() -> list[Case]:
    """Returns the few cases that `tests/test_witness.py` runs, each with as many features as possible."""
    short: Changes = {
        "steps": 6,
        "batch_size": 16,
        "eval_every": 3,
        "checkpoint_every": 6,
        "data.train": "train[:64]",
        "data.test": "test[:16]",
        "optim.schedule.warmup_steps": 2,
        **for_encoder("image", channels=(4,), strides=(8,), norm="layer"),
        **MISSING,
    }
    # The gradient of a bias before batch normalisation consists of rounding errors, which Adam scales to full steps and
    # lagging running means make visible in validation. SGD does not change such a bias.
    batch = {**for_encoder("image", norm="batch"), "optim.name": "sgd", "optim.learning_rate": 0.03}
    frozen = {**for_encoder("image", freeze=3, layer_decay=0.5), "optim.name": "momentum"}
    frozen |= {"optim.schedule.name": "step", "optim.schedule.warmup_steps": None}
    number = {"kind": "regression", "feature": "label", **_NUMBER}
    two = {"data.targets": {"label": {**_CLASS, "label_smoothing": 0.1}, "number": number}, "select": "label/accuracy"}
    some = "objectives=gradnorm+ogm_ge+mixup+modality_dropout"
    mesh = {"parallel.mode": "jit", "parallel.mesh.fsdp": 2, "parallel.mesh.model": 2}
    spike = {"recovery.spike": 0.5, "steps": 26, "eval_every": 13, "checkpoint_every": 26}
    return [
        quickstart("micro-batches", "fusion=merged_attention", short, DROPOUT, ACCUMULATE),
        quickstart("objectives", f"fusion=concat,{some}", short, two, ACCUMULATE),
        quickstart("objectives on devices", f"fusion=concat,{some}+unimodal+mvae", short, two, batch, devices=8),
        quickstart("heads weighed", "fusion=late_mean,objectives=gradient_blending+ogm_ge", short, ACCUMULATE),
        quickstart("mesh", "fusion=concat,objectives=contrastive+gan", short, mesh, devices=8),
        quickstart("held back", "fusion=concat,objectives=adversarial+cca", short, frozen),
        quickstart("spikes", "fusion=concat", short, spike),
    ]


_NUMBER = {"loss": "huber", "scale": "none", "metrics": (), "weight": 0.5}
_CLASS = {
    "kind": "classification",
    "feature": "label",
    "classes": 0,
    "loss": "cross_entropy",
    "gamma": 2.0,
    "label_smoothing": 0.0,
    "class_weights": (),
    "weight": 1.0,
}
