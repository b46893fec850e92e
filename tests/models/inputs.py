"""Tokens and masks of three modalities, and small fusion strategies."""

import jax
import numpy as np

from mmfusion.models.build import module_options
from mmfusion.models.fusion import FUSIONS

WIDTH = 8
RANDOM = np.random.default_rng(0)
COUNTS = {"text": 5, "audio": 3, "image": 4}  # unsorted, as a caller's dictionary may be
TOKENS = {m: RANDOM.normal(size=(3, n, WIDTH)).astype(np.float32) for m, n in COUNTS.items()}
MASK = {
    "text": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool),
    "audio": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool),
    "image": np.ones((3, 4), bool),
}
ROWS, RNGS = {"rows": {"id": np.arange(3)}}, {"dropout": jax.random.key(3)}
FEATURE = [name for name, kind in FUSIONS.items() if kind.declares.level == "feature"]
OPTIONS = {
    name: {"heads": 2} | ({"layers": 1} if "layers" in module_options(kind) else {})
    for name, kind in FUSIONS.items()
    if "heads" in module_options(kind)
}
OPTIONS["mult"]["memory"] = 1
OPTIONS |= {name: {"dropout": 0.0} for name in ("mfb", "mfh")}  # those of others are 0


# The first strategy of each family, where a test of every strategy would show little more.
FIRST_OF_FAMILY = tuple({kind.declares.family: name for name, kind in reversed(FUSIONS.items())}.values())


def make(name, **options):
    return FUSIONS[name](width=WIDTH, **{**OPTIONS.get(name, {}), **options})


def take(count):
    names = list(COUNTS)[:count]
    return {m: TOKENS[m] for m in names}, {m: MASK[m] for m in names}


def with_nan_padding(tokens, mask):
    return {m: np.where(mask[m][..., None], tokens[m], np.nan) for m in tokens}


def without(mask, modality, row):
    kept = mask[modality].copy()
    kept[row] = False
    return {**mask, modality: kept}
