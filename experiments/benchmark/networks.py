"""The networks that are compared, as configs for this package, and their batches as NumPy arrays for every library.

Only NumPy is imported at the top, as the peers read the batches.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

STEPS = 10  # before the rounds, of which both sides show the losses

# What the peers need to know; `config` below builds the same from this package's configs.
NETWORKS: dict[str, dict[str, Any]] = {
    "article": {"side": 32, "length": 64, "vocabulary": 10_000, "classes": 10, "rate": 1e-3, "b2": 0.999},
    "quickstart": {"side": 32, "length": 12, "vocabulary": 100, "classes": 2, "rate": 1.5e-3, "b2": 0.98},
    "easy_vqa": {"side": 64, "length": 16, "vocabulary": 100, "classes": 13, "rate": 1e-3, "b2": 0.999},
    "resnet18": {"side": 32, "length": 32, "vocabulary": 1000, "classes": 10, "rate": 1e-3, "b2": 0.999},
}


def batches(network: str, size: int, count: int = STEPS, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Returns batches of random images uint8, texts of random lengths with their mask, and labels."""
    made, random = NETWORKS[network], np.random.default_rng(seed)
    result = []
    for _ in range(count):
        lengths = random.integers(made["length"] // 2, made["length"] + 1, size)
        mask = np.arange(made["length"]) < lengths[:, None]
        ids = random.integers(2, made["vocabulary"], (size, made["length"]))
        result.append({
            "image": random.integers(0, 256, (size, made["side"], made["side"], 3), np.uint8),
            "text": np.where(mask, ids, 0).astype(np.int32),
            "mask": mask,
            "label": random.integers(0, made["classes"], size).astype(np.int32),
        })  # fmt: skip
    return result


def config(network: str, batch_size: int, changes: Mapping[str, Any] | None = None) -> Any:
    """Returns this package's config of a network, with changes by dotted path."""
    from configs import cifar_imdb, easy_vqa, quickstart
    from mmfusion.config import defaults

    if network == "article":
        made = cifar_imdb.get_config("network=article")
    elif network == "easy_vqa":
        made = easy_vqa.get_config()
    else:
        made = quickstart.get_config("fusion=cross_attention" if network == "resnet18" else "")
    with made.unlocked():
        made.batch_size = batch_size
        if network == "resnet18":
            made.model.encoders.image = defaults.encoder("image", "resnet18", norm="batch")
            made.model.encoders.text = defaults.encoder("text", "transformer")
            made.model.fusion.layers = 2
            made.data.modalities.text.update({"vocabulary_size": 1000, "length": 32})
            made.optim = defaults.optimizer("adamw", 1e-3)
        for path, value in (changes or {}).items():
            made.update_from_flattened_dict({path: value})
    return made


def dataset(made: Any, classes: int) -> Any:
    """Returns a dataset without rows for a config of an image and a text, so that a model can be built."""
    from mmfusion.data import text
    from mmfusion.data.dataset import Dataset
    from mmfusion.data.decoding import Reader

    size = made.data.modalities.text.vocabulary_size
    reader = Reader(
        modalities=made.data.modalities.to_dict(),
        targets=made.data.targets.to_dict(),
        outputs={"label": classes},
        fitted={"text": text.train_tokenizer([" ".join(f"w{i}" for i in range(size))], "word", size)},
    )
    return Dataset({}, reader, {"label": tuple(map(str, range(classes)))}, {}, "", "", {}, "benchmark")


def setup(network: str, batch_size: int, changes: Mapping[str, Any] | None = None) -> Any:
    """Returns the TrainSetup of a network."""
    from mmfusion.training.setup import build_setup

    made = config(network, batch_size, changes)
    return build_setup(made, dataset(made, NETWORKS[network]["classes"]))


def as_batch(arrays: Mapping[str, np.ndarray]) -> Any:
    """Returns a batch of `batches` as this package's Batch."""
    from mmfusion.data.batch import Batch

    size = len(arrays["label"])
    present = np.ones(size, bool)
    made: dict[str, Any] = {
        "inputs": {"image": arrays["image"], "text": arrays["text"]},
        "mask": {"image": present[:, None], "text": arrays["mask"]},
        "present": {"image": present, "text": present},
        "targets": {"label": arrays["label"]},
        "weight": np.ones(size, np.float32),
        "id": np.arange(size, dtype=np.int32),
    }
    return Batch(**made)


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree of parameters by path, `encoders_text/embed/embedding`."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
