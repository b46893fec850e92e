"""Valid and invalid rows that replace a TFDS dataset, and a tiny config for them."""

import io
from typing import Any

import numpy as np
import soundfile
from ml_collections import ConfigDict
from PIL import Image

from mmfusion.config import defaults
from mmfusion.data import sources
from tests import tiny

CLASSES = {"label": ("no", "yes")}
TASKS = {"label": "classification", "tags": "multilabel", "amount": "regression"}
SMALL = {
    "steps": 2,
    "batch_size": 8,
    "eval_every": 2,
    "checkpoint_every": 2,
    "log_every": 1,
    "data.name": "planted",
    "data.valid_fraction": 0.3,
    "model.width": 8,
}


def config(modalities: str = "image+text+audio", tasks: str = "label", **changes: Any) -> ConfigDict:
    """Returns a config of a few thousand parameters for `row`s; keys of `changes` are paths with `__` for a dot."""
    result = defaults.get_config()
    with result.unlocked():
        result.data.modalities.image = defaults.modality("image", "image", size=(8, 8))
        result.data.modalities.text = defaults.modality("text", "text", length=6)
        result.data.modalities.audio = defaults.modality("audio", "audio", rate=1000, seconds=0.1)
        result.model.encoders.image = defaults.encoder("image", "cnn", channels=(4,), strides=(4,))
        result.model.encoders.text = defaults.encoder("text", "bow", tokens="all")
        result.model.encoders.audio = defaults.encoder("audio", "logmel_cnn", channels=(4,), strides=(2,), mels=8)
        result.model.fusion = defaults.fusion("mean")  # fastest to compile
        for task in tasks.split("+"):
            options = {"classes": 3} if task == "tags" else {}
            result.data.targets[task] = defaults.target(TASKS[task], task, **options)
        result.select = "loss"
    defaults.keep_modalities(result, modalities)
    for path, value in {**SMALL, **{path.replace("__", "."): value for path, value in changes.items()}}.items():
        tiny.put(result, path, value)
    return result.lock()


def png(value: int) -> bytes:
    """Returns a PNG of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def wav(value: float, samples: int = 100) -> bytes:
    """Returns a sine wave as WAV bytes at 1000 Hz with `samples` samples."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(samples) * value), 1000, format="WAV")
    return buffer.getvalue()


def row(number: int, **changes: Any) -> dict[str, Any]:
    """Returns a valid row that encodes its number in every modality, with `changes`."""
    return {
        "image": png(number % 200 + 20),
        "text": f"row {number} number{number % 7}",
        "audio": wav(0.1 + number / 50),
        "label": number % 2,
        "tags": [number % 3],
        "amount": np.float32(number / 10),
        "group": f"g{number // 2}",
        **changes,
    }


def plant(monkeypatch, names: dict[str, tuple[str, ...]] | None = None, **splits: list[dict[str, Any]]) -> None:
    """Makes the given rows the splits of the dataset `planted`, which has no other split."""

    def open_source(name: str, split: str, **_: Any) -> sources.Source:
        assert name == "planted"
        return sources.Source(
            splits[split], CLASSES if names is None else names, f"{name}:{split}:{len(splits[split])}"
        )

    monkeypatch.setattr(sources, "open_source", open_source)
    monkeypatch.setattr(sources, "check_name", lambda *_: None)
