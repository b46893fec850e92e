"""The cases of `tests/witness.py`: command lines of `python -m experiments.train`, as small as they can be made.

Every path and value is written out, and none is looked up in the package, so that the cases stay the same while the
package changes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

Changes = Mapping[str, Any]  # dotted path of a config -> value; None: the path is left as the config has it


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the command line, and what is done before and after it.

    Attributes:
      name: `group/what/how`.
      config: what follows `--config=configs/`; `{before}` stands for the folder of the runs `before`.
      changes: overrides of the config, see `Changes`.
      devices: how many devices the CPU is divided into.
      archives: whether its data comes from archives that were fetched by hand.
      resume: the step of a checkpoint to continue from after the run, as if it had been killed after it; 0: none.
      before: folder -> config and changes of a run that comes first.
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
GIVEN = {"data.valid": "valid[:64]"}  # of the data that brings a validation split
ACCUMULATE = {"optim.accumulate": 2}
MISSING = {"data.missing": 0.3}
DROPOUT = {"model.fusion.dropout": 0.1}
THREE = ("gray", "colour", "deep")
RNN = {"hidden": 8, "embedding": 8}


def of(modality: str, **options: Any) -> Changes:
    """Returns changes of the options of a modality's encoder."""
    return {f"model.encoders.{modality}.{name}": value for name, value in options.items()}


TINY: Changes = {
    "data.modalities.text.length": 8,
    **of("image", channels=(4, 8), strides=(4, 2)),
    **of("text", name="bow", tokens="all", dropout=0.1),
}
PICTURES: Changes = {key: value for m in THREE for key, value in of(m, channels=(4, 4), dropout=0.1).items()}
CELLS: Changes = {key: value for m in THREE for key, value in of(m, channels=(4,), strides=(4,)).items()}
SOUND: Changes = {"data.modalities.audio.seconds": 0.2, **of("audio", channels=(4, 4, 4))}
EVENTS = of("behaviour", hidden=8, heads=2, layers=1, dropout=0.1)
SMALL_PICTURE = of("image", channels=(4, 4, 4))

# Config: its changes, and whether its data comes from archives.
CONFIGS: dict[str, tuple[Changes, bool]] = {
    "quickstart": ({**of("image", channels=(4, 4, 8)), **of("text", **RNN, dropout=0.1), **DROPOUT}, False),
    "applications:application=medical_notes": ({**SMALL_PICTURE, **of("notes", **RNN)}, False),
    "applications:application=surveillance": ({**SOUND, **of("video", channels=(4, 4, 4))}, False),
    "applications:application=recommendation": ({**SMALL_PICTURE, **of("text", **RNN), **EVENTS}, False),
    "applications:application=interaction": (
        {
            **SMALL_PICTURE,
            **of("text", **RNN),
            **of("speech", channels=(4, 4, 4)),
            "data.modalities.speech.seconds": 0.2,
        },
        False,
    ),
    "av_digits": ({**SOUND, **SMALL_PICTURE, **of("audio", mask_frames=3, mask_bands=5)}, True),
    "cifar_imdb:data=archives": ({**SMALL_PICTURE, **of("text", **RNN)}, True),
    "digit_views": ({key: value for m in ("fou", "zer", "mor") for key, value in of(m, hidden=(8,)).items()}, True),
    "easy_vqa": ({**SMALL_PICTURE, **of("text", **RNN), **DROPOUT}, True),
    "fashion": ({**SMALL_PICTURE, **of("text", **RNN), **GIVEN}, True),
    "knowledge": ({**SMALL_PICTURE, **of("text", **RNN), **of("knowledge", hidden=8, heads=2, layers=1)}, False),
    "leaf": ({**SMALL_PICTURE, **of("table", hidden=(8,)), **GIVEN}, True),
    "sound_pictures": (
        {
            "data.modalities.audio.seconds": 0.1,
            "data.modalities.image.size": (64, 64),
            **of("audio", channels=(4, 4, 4, 4, 4)),
            **of("small", channels=(4, 4, 4)),
            **of("image", channels=(4, 4, 4, 4)),
            **of("text", **RNN),
        },
        False,
    ),
    "tfds:text=sentence": ({**SMALL_PICTURE, **of("text", **RNN)}, False),
    "three_pictures": (PICTURES, False),
    "vgg_text:size=32": ({**of("image", channels=2), **of("text", dense=8), **GIVEN}, True),
    "xray_ct:size=32": (of("xray", channels=(4, 4), hidden=8), False),
}

# Objective: further changes, where it runs on a picture and a sentence.
ON_IMAGE_AND_TEXT: dict[str, Changes] = {
    "contrastive": MISSING,
    "cca": MISSING,
    "adversarial": MISSING,
    "mvae": MISSING,
    "mmvae": MISSING,
    "gan": MISSING,
    "unimodal": MISSING,
    "ogm_ge": MISSING,
    "gradient_blending": MISSING,
    "mixup": MISSING,
    "modality_dropout": {},
}
# The same of pictures alone, or of two tasks.
ON_PICTURES: dict[str, tuple[str, Changes]] = {
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
    """Returns a case of `COMMON` with changes, the later ones over the earlier ones."""
    merged = {key: value for part in (COMMON, *changes) for key, value in part.items()}
    return Case(name, config, merged, **options)


def both(name: str, config: str, *changes: Changes, **options: Any) -> Iterator[Case]:
    """Yields a case on one device with two micro-batches, and on eight devices."""
    yield case(f"{name}/accumulate", config, *changes, ACCUMULATE, **options)
    yield case(f"{name}/devices", config, *changes, devices=8, **options)


def quickstart(name: str, arg: str = "fusion=concat", *changes: Changes, **options: Any) -> Case:
    """Returns a case of the smallest run, of a picture and a sentence, `TINY` with changes."""
    return case(name, f"quickstart:{arg}", TINY, *changes, **options)


def pictures(name: str, arg: str, *changes: Changes, **options: Any) -> Case:
    """Returns a case of three pictures, which some modality has and some has not."""
    return case(name, f"three_pictures:{arg}", PICTURES, MISSING, *changes, **options)


def cases() -> list[Case]:
    """Returns all cases, those first that say most."""
    groups = (_configs, _objectives, _together, _resumed, _encoders, _optim, _parallel, _data, _recovery, _fusions)
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
    for name, (tasks, changes) in ON_PICTURES.items():
        config = f"three_pictures:tasks={tasks},objectives={name}"
        yield from both(f"objective/{name} of pictures", config, PICTURES, MISSING, changes)
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


def _together() -> Iterator[Case]:
    every = "gradnorm+ogm_ge+unimodal+mixup+modality_dropout+mvae"
    weights = {
        "data.targets.shown.weight": 0.5,
        "data.targets.label.label_smoothing": 0.1,
        "objectives.mvae.weight": 0.3,
        "objectives.unimodal.weight": 0.7,
    }
    # So slow that the loss does not fall below where a spike begins.
    spike = {"recovery.spike": 0.3, "steps": 40, "optim.learning_rate": 2e-4}
    yield from both(
        "together/everything",
        f"three_pictures:tasks=label+shown,objectives={every}",
        PICTURES, MISSING, weights, spike, {"recovery.updates": 10},
    )  # fmt: skip
    yield from both(
        "together/gradnorm and gradient_blending",
        "three_pictures:tasks=label+shown,objectives=gradnorm+gradient_blending+mvae",
        PICTURES, MISSING, {"data.targets.shown.weight": 0.5}, {"eval_every": 5},
    )  # fmt: skip
    yield from both(
        "together/uncertainty and gradient_blending",
        "three_pictures:tasks=label+shown,objectives=uncertainty+gradient_blending+modality_dropout",
        PICTURES, MISSING, {"eval_every": 5},
    )  # fmt: skip
    number = {"data.targets.shown": {"kind": "regression", "feature": "shown", "loss": "huber", "weight": 0.5}}
    yield from both(
        "together/a class and a number",
        "three_pictures:tasks=label+shown,objectives=uncertainty+unimodal+contrastive",
        PICTURES, MISSING, number,
    )  # fmt: skip
    yield pictures("together/late, two tasks", "tasks=label+shown,fusion=late_mean,objectives=uncertainty", ACCUMULATE)
    yield pictures("together/three objectives", "objectives=contrastive+adversarial+gan", ACCUMULATE)
    for fusion in ("late_mean", "tmc", "moe"):
        for objective in ("ogm_ge", "unimodal", "gradient_blending", "ogm_ge+unimodal+mixup"):
            if (fusion, objective) != ("tmc", "gradient_blending"):
                arg = f"fusion={fusion},objectives={objective}"
                yield quickstart(f"together/{fusion}+{objective}", arg, MISSING, ACCUMULATE)
        arg = f"fusion={fusion},objectives=ogm_ge+unimodal"
        yield quickstart(f"together/{fusion} on devices", arg, MISSING, devices=8)


def _resumed() -> Iterator[Case]:
    between = {"checkpoint_every": 7}
    # Of the newest two, which are kept, one must lie between two validations.
    often = {"eval_every": 5, "checkpoint_every": 9}
    blending = "tasks=label+shown,objectives=gradient_blending+gradnorm"
    plateau = {"optim.schedule.name": "plateau", **SCHEDULES["plateau"]}
    spike = {"recovery.spike": 1.0, "steps": 40}
    yield quickstart("resumed/plain", "fusion=co_attention,objectives=modality_dropout", between, ACCUMULATE, resume=14)
    yield quickstart("resumed/on devices", "fusion=concat,objectives=mixup+ogm_ge", between, devices=8, resume=14)
    yield pictures("resumed/heads and tasks weighed", blending, often, ACCUMULATE, resume=18)
    yield quickstart("resumed/plateau", "fusion=concat", plateau, often, resume=18)
    yield quickstart("resumed/spikes", "fusion=concat", spike, {"checkpoint_every": 35}, resume=35)
    fsdp = {"parallel.mode": "jit", "parallel.mesh.fsdp": 2}
    yield quickstart("resumed/fsdp", "fusion=concat", between, fsdp, devices=8, resume=14)


def _encoders() -> Iterator[Case]:
    for steps in (8, 10**9):
        freeze = of("image", freeze=steps)
        yield from both(f"encoder/frozen for {steps}", "quickstart:fusion=concat,objectives=unimodal", TINY, freeze)
    decay = of("image", layer_decay=0.5)
    yield from both("encoder/layer_decay", "quickstart:fusion=concat", TINY, decay, of("image", freeze=5))
    of_two = "xray_ct:size=32,joined=False"
    small = of("xray", channels=(4, 4), hidden=8)
    yield from both("encoder/shared", f"{of_two},shared=True", small, MISSING)
    yield case("encoder/shared and held back", f"{of_two},shared=True,objectives=ogm_ge", small, MISSING, ACCUMULATE)
    yield from both("encoder/apart", of_two, small, of("ct", channels=(4, 4), hidden=8), MISSING)
    moved = {f"data.modalities.{m}.augment.crop": 4 for m in ("xray", "ct")}
    yield from both("encoder/joined", "xray_ct:size=32", small, MISSING, moved)
    resnet = {**of("image", name="resnet18", norm="batch", channels=4), "data.modalities.image.size": (16, 16)}
    yield from both("encoder/resnet18 with batch norm", "quickstart:fusion=concat", {**TINY, **_without_cnn()}, resnet)
    alone = {name: (f"quickstart:fusion=concat,modalities={name}", _of_one(name)) for name in ("image", "text")}
    yield quickstart("encoder/from runs", "fusion=concat,encoders={before}", before=alone)
    init = of("image", init="run:{before}/image", freeze=10)
    image = {"image": alone["image"]}
    yield quickstart("encoder/from a run, learning later", "fusion=concat", init, before=image)


def _of_one(modality: str) -> Changes:
    """Returns the changes of the smallest run that read this modality."""
    other = {"image": ".text.", "text": ".image."}[modality]
    return {key: value for key, value in {**COMMON, **TINY}.items() if other not in key}


def _without_cnn() -> Changes:
    return {key: None for key in TINY if key.startswith("model.encoders.image.")}


def _optim() -> Iterator[Case]:
    for name in OPTIMIZERS:
        rate = {"optim.learning_rate": 0.03 if name in ("sgd", "momentum") else 3e-3}
        changes = {"optim.name": name, **rate} | ({} if name == "adam" else {"optim.weight_decay": 0.01})
        yield quickstart(f"optim/{name}", "fusion=concat", changes, ACCUMULATE)
    for name, changes in SCHEDULES.items():
        yield quickstart(f"optim/schedule {name}", "fusion=concat", {"optim.schedule.name": name, **changes})
    yield quickstart("optim/schedule end_factor", "fusion=concat", {"optim.schedule.end_factor": 0.3})
    yield quickstart("optim/clipped", "fusion=concat,objectives=mvae", {"optim.clip_norm": 0.1}, of("image", freeze=8))
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
    batch = {**of("image", norm="batch"), "parallel.mode": "jit"}
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
    alone = {"image": "fusion=concat,modalities=image", "text": "fusion=concat,modalities=text"}
    for name, arg in alone.items():
        yield case(f"data/{name} alone", f"quickstart:{arg}", _of_one(name), ACCUMULATE)
    graph = {
        "data.modalities.mor": {
            "kind": "graph",
            "feature": "mor+mor",  # six nodes of one number, and a matrix of the same numbers
            "nodes": 6,
            "features": 1,
            "edges": "matrix",
        },
        **of("fou", hidden=(8,)),
    }
    config = "digit_views:modalities=fou+mor,fusion=concat"
    for encoder, hidden in (("gcn", (8, 8)), ("graph_attention", 8)):
        changes = {**graph, **of("mor", name=encoder, hidden=hidden)}
        yield from both(f"data/graph by {encoder}", config, changes, archives=True)
    article = "cifar_imdb:network=article,data=archives"
    yield case("data/paired", article, of("image", channels=(4, 4)), of("text", **RNN), MISSING, archives=True)
    audio = {**SOUND, **of("audio", channels=(4,) * 5), **SMALL_PICTURE}
    yield case("data/resampled", "sound_pictures:classes=10", audio, archives=True)
    yield case("data/co-occurrences", "knowledge:triples=", CONFIGS["knowledge"][0], ACCUMULATE)


def _recovery() -> Iterator[Case]:
    spike = {"recovery.spike": 0.5, "steps": 40}
    yield quickstart("recovery/spikes", "fusion=concat", spike, ACCUMULATE)
    yield quickstart("recovery/spikes on devices", "fusion=concat", spike, devices=8)
    back = {"recovery.updates": 2, "recovery.rollbacks": 2, "checkpoint_every": 5}
    yield quickstart("recovery/back, and given up", "fusion=concat", spike, back, {"recovery.spike": 0.01})
    # The rate grows to where the loss explodes; gone back, the run takes a small part of it and ends well.
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
    """Yields encoders that no other case has; those that compile for minutes are left out."""
    size = {"data.modalities.image.size": (32, 32), **_without_cnn()}
    options = {"vit_ti": {"layers": 2, "hidden": 24, "heads": 3}, "convnext_t": {"channels": 4}}
    for name in ("pooled_cnn", "cnn_rnn", "lenet5", "vit_ti", "convnext_t"):
        changes = of("image", name=name, **options.get(name, {}))
        yield quickstart(f"encoder/{name}", "fusion=concat", size, changes)
    text = {key: None for key in TINY if key.startswith("model.encoders.text.")}
    for name in ("textcnn", "rnn", "transformer"):
        yield quickstart(f"encoder/{name}", "fusion=concat", text, of("text", name=name))
    yield case(
        "encoder/cnn3d", "applications:application=surveillance", SOUND, of("video", name="cnn3d", channels=(4, 4, 4))
    )
    views = {key: value for m in ("fou", "zer", "mor") for key, value in of(m, hidden=(8,)).items()}
    table = {
        **views,
        "model.encoders.mor.hidden": None,
        **of("mor", name="ft_transformer", hidden=8, heads=2, layers=1),
    }
    yield case("encoder/ft_transformer", "digit_views:fusion=concat", table, archives=True)


def few_cases() -> list[Case]:
    """Returns the few cases that `tests/test_witness.py` runs each time: as much in each as a config takes."""
    less: Changes = {
        "steps": 6,
        "batch_size": 16,
        "eval_every": 3,
        "checkpoint_every": 6,
        "data.train": "train[:64]",
        "data.test": "test[:16]",
        "optim.schedule.warmup_steps": 2,
        **of("image", channels=(4,), strides=(8,), norm="layer"),
        **MISSING,
    }
    # A bias before batch normalisation has a gradient of rounding errors alone, of which Adam makes whole steps, and
    # running means that lag behind let validation see them: SGD keeps it where it is.
    batch = {**of("image", norm="batch"), "optim.name": "sgd", "optim.learning_rate": 0.03}
    held = {**of("image", freeze=3, layer_decay=0.5), "optim.name": "momentum"}
    held |= {"optim.schedule.name": "step", "optim.schedule.warmup_steps": None}
    number = {"kind": "regression", "feature": "label", "loss": "huber", "weight": 0.5}
    two = {"data.targets": {"label": {**_CLASS, "label_smoothing": 0.1}, "number": number}, "select": "label/accuracy"}
    some = "objectives=gradnorm+ogm_ge+mixup+modality_dropout"
    mesh = {"parallel.mode": "jit", "parallel.mesh.fsdp": 2, "parallel.mesh.model": 2}
    spike = {"recovery.spike": 0.5, "steps": 26, "eval_every": 13, "checkpoint_every": 26}
    return [
        quickstart("micro-batches", "fusion=merged_attention", less, DROPOUT, ACCUMULATE),
        quickstart("objectives", f"fusion=concat,{some}", less, two, ACCUMULATE),
        quickstart("objectives on devices", f"fusion=concat,{some}+unimodal+mvae", less, two, batch, devices=8),
        quickstart("heads weighed", "fusion=late_mean,objectives=gradient_blending+ogm_ge", less, ACCUMULATE),
        quickstart("mesh", "fusion=concat,objectives=contrastive+gan", less, mesh, devices=8),
        quickstart("held back", "fusion=concat,objectives=adversarial+cca", less, held),
        quickstart("spikes", "fusion=concat", less, spike),
    ]


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
