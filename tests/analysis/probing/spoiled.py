"""A batch with every modality type, to be corrupted."""

import numpy as np

from mmfusion.analysis.probing.corruption import corrupt
from mmfusion.data import text
from mmfusion.data.batch import Batch
from mmfusion.data.modalities import MODALITY_TYPES

ROWS, LENGTH, SAMPLES = 40, 24, 400
ABSENT, PADDING = 3, 38  # the absent row and the first padding row; both contain values, so that a change is visible
WORDS = ["melon", "a", "harbour", "it's", "window,", "naïve", "quickly", "café!", "two", "1999", "zebra"]
TOKENIZERS = {
    # "zebra" is not in the word vocabulary; it becomes "[OOV]".
    "word": text.train_tokenizer([" ".join(WORDS[:-1])], "word", 100),
    "bpe": text.train_tokenizer([" ".join(WORDS)] * 3, "bpe", 300),
}
# The table's columns: a numeric one, a categorical one, and a feature of three values.
COLUMNS = {
    "age": {"mean": [0.0], "std": [1.0]},
    "kind": {"categories": ["a", "b", "c", "d"]},
    "sizes": {"mean": [0.0] * 3, "std": [1.0] * 3},
}


def make_batch(tokenizer="word", size=(16, 16, 3)):
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, random.integers(1, 14))) for _ in range(ROWS)]
    tokens, text_mask = text.encode(TOKENIZERS[tokenizer], sentences, LENGTH)
    audio_mask = np.arange(SAMPLES) < random.integers(SAMPLES // 2, SAMPLES + 1, ROWS)[:, None]  # [B, S]
    coarse = random.integers(0, 256, (ROWS, size[0] // 4, size[1] // 4, size[2]), np.uint8)
    ids = 1000 - 7 * np.arange(ROWS, dtype=np.int32)
    present = np.ones(ROWS, bool)
    present[ABSENT] = False
    ids[PADDING:] = -1
    edges = np.triu(random.random((ROWS, 9, 9)) < 0.5, 1).astype(np.float32)
    columns = np.stack([random.normal(size=ROWS), random.integers(5, size=ROWS), *random.normal(size=(3, ROWS))], 1)
    table_mask = random.random((ROWS, 5)) < 0.8
    table_mask[:, 3] = True
    frame_mask = np.arange(8) < random.integers(4, 9, ROWS)[:, None]
    batch = Batch(
        inputs={
            "image": coarse.repeat(4, 1).repeat(4, 2),  # smooth enough for blur to be gradual
            "text": tokens,
            "audio": np.where(audio_mask, random.normal(0, 0.1, (ROWS, SAMPLES)), 0).astype(np.float32),
            "video": random.integers(0, 256, (ROWS, 8, 4, 4, 3), np.uint8).repeat(4, 2).repeat(4, 3),
            "table": np.where(table_mask, columns, 0).astype(np.float32),
            "graph": np.concatenate([random.random((ROWS, 9, 2), np.float32), edges + edges.swapaxes(1, 2)], 2),
            "knowledge": np.concatenate([np.ones((ROWS, 9, 2)), edges + 2 * edges.swapaxes(1, 2)], 2).astype(np.int32),
            "embedding": random.normal(size=(ROWS, 6)).astype(np.float32),
            "sequence": (random.normal(size=(ROWS, 8, 3)) * frame_mask[..., None]).astype(np.float32),
            "images": random.integers(0, 256, (ROWS, 8, 4, 4, 3), np.uint8).repeat(4, 2).repeat(4, 3),
        },
        mask={
            "image": np.ones((ROWS, 1), bool),
            "text": text_mask,
            "audio": audio_mask,
            "video": frame_mask,
            "table": table_mask,
            "graph": np.ones((ROWS, 9), bool),
            "knowledge": np.ones((ROWS, 9), bool),
            "embedding": np.ones((ROWS, 1), bool),
            "sequence": frame_mask,
            "images": frame_mask,
        },
        present=dict.fromkeys(MODALITY_TYPES, present),
        targets={"label": np.zeros(ROWS, np.int32)},
        weight=(ids >= 0).astype(np.float32),
        id=ids,
    )
    for array in (*batch.inputs.values(), *batch.mask.values()):
        array.flags.writeable = False  # an in-place write raises
    return batch


def corruptible_rows():
    return [row for row in range(PADDING) if row != ABSENT]


def corrupt_batch(batch, kind, name, severity, seed=0, tokenizer="word"):
    fitted = {"text": TOKENIZERS[tokenizer], "table": COLUMNS}
    return corrupt(batch, kind, kind, name, severity, seed, fitted.get(kind))


def real(batch, kind, row):
    """Returns a row's unmasked values; for a table all columns, with 9 for missing ones."""
    values, mask = batch.inputs[kind][row], batch.mask[kind][row]
    if kind == "table":
        return np.where(mask, values, 9)
    return values if kind in ("image", "graph", "knowledge", "embedding") else values[mask]
