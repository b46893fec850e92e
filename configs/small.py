"""Nine tasks on real and generated data at sizes for a study of twelve strategies in a night on two cores.

python -m experiments.train --config=configs/small.py:task=leaf --workdir=DIR --config.data.manual_dir=ARCHIVES

Small images, narrow encoders and batches of 32; a run ends after five validations without a better one. Tasks:
easy_vqa, av_digits_clean, av_digits_hard, fashion_season, fashion_label, leaf, digit_views, cifar_imdb,
shapes_relations. A step takes 4 to 46 ms on one shared x86-64 core; no score was measured.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import av_digits, cifar_imdb, digit_views, easy_vqa, fashion, leaf, quickstart
from mmfusion.config.arguments import parse_arg
from mmfusion.errors import UserError


class Task(NamedTuple):
    """The config of a task at its full size, an argument of it, its steps, and keys that make it small."""

    get_config: Callable[[str], ConfigDict]
    argument: str
    steps: int
    changes: dict[str, Any]


NARROW = (16, 32, 64)
IMAGE = {"model.encoders.image.channels": NARROW}
PHOTO = {**IMAGE, "data.modalities.image.size": (40, 32)}
SOUND = {**IMAGE, "model.encoders.audio.channels": NARROW, "model.encoders.audio.hop_ms": 16.0}
TASKS = {
    "easy_vqa": Task(easy_vqa.get_config, "", 1500, {**IMAGE, "data.modalities.image.size": (32, 32),
                                                     "data.test": "test[:3000]"}),
    "av_digits_clean": Task(av_digits.get_config, "variant=clean", 1000, SOUND),
    "av_digits_hard": Task(av_digits.get_config, "variant=hard", 1000, SOUND),
    "fashion_season": Task(fashion.get_config, "target=season", 1000, PHOTO),
    "fashion_label": Task(fashion.get_config, "target=label", 1000, PHOTO),
    "leaf": Task(leaf.get_config, "", 1200, {**IMAGE, "data.modalities.image.size": (32, 32), "model.width": 64}),
    "digit_views": Task(digit_views.get_config, "", 2000, {}),
    "cifar_imdb": Task(cifar_imdb.get_config, "data=archives", 1200, {**IMAGE, "data.modalities.text.length": 32,
                                                                      "data.test": "test[:3000]"}),
    "shapes_relations": Task(quickstart.get_config, "variant=relations", 2000,
                             {"data.modalities.image.size": (24, 24)}),
}  # fmt: skip


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config; arguments: those of `defaults.begin`, and task."""
    given = parse_arg(arg, task="leaf", fusion="concat", seed=0, modalities="", objectives="", encoders="")
    if given.task not in TASKS:
        raise UserError("unknown choice", path="config argument task", value=given.task, choices=TASKS)
    task = TASKS[given.task]
    common = [f"{name}={value}" for name, value in given.items() if name != "task" and value != ""]
    config = task.get_config(",".join(filter(None, [task.argument, *common]))).unlock()
    config.steps, config.batch_size, config.early_stopping = task.steps, 32, 5
    config.eval_every = config.checkpoint_every = 100
    for path, value in task.changes.items():
        *sections, key = path.split(".")
        section = config
        for part in sections:
            section = section.get(part, {})
        if key in section:  # of a modality that is kept
            section[key] = value
    return config.lock()
