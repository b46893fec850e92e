"""Silhouettes of leaves with three feature vectors of 64 values (Mallah, Cope & Orwell, 2013)."""

import csv
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import archives, generate

# File below `manual_dir` -> its SHA-256.
FILES = {
    "leaf/data.npz": "5dd431f6e997a946f49a0716c96e080c80f4d6eb84ba4812cfae3fbc8d9bd8e6",
    "leaf/manifest.csv": "e204bf895c9972652968b9d184939081cf1e9d5e9c1bdfc77123fc7bf668ca77",
}
VIEWS = ("margin", "shape", "texture")


class Builder(tfds.core.GeneratorBasedBuilder):
    """990 leaves of 99 species: a grayscale image 96x96, and measurements of margin, shape and texture.

    Features: `image` PNG, `margin`, `shape`, `texture` (64 values each), `label` (the species), `group` and `id`.
    Splits: train (6 leaves per species), valid (1), test (3).
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(FILES)} here."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://archive.ics.uci.edu/dataset/241/one+hundred+plant+species+leaves+data+set",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(96, 96, 1), encoding_format="png"),
                    **{view: tfds.features.Tensor(shape=(64,), dtype=np.float32) for view in VIEWS},
                    "label": tfds.features.ClassLabel(num_classes=99),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        data, manifest = (archives.read_manual_file(dl_manager, name, digest) for name, digest in FILES.items())
        arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
        rows = list(csv.DictReader(io.StringIO(manifest.decode(), newline="")))
        return {
            split: self._generate_examples(arrays, [row for row in rows if row["split"] == name])
            for split, name in (("train", "train"), ("valid", "val"), ("test", "test"))
        }

    def _generate_examples(
        self, arrays: dict[str, np.ndarray], rows: list[dict[str, str]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            number, name = int(row["row"]), f"leaf-{row['kaggle_id']}"
            yield (
                name,
                {
                    "image": io.BytesIO(generate.png(arrays["images"][number])),
                    **{view: arrays[view][number] for view in VIEWS},
                    "label": int(row["label"]),
                    "group": name,
                    "id": name,
                },
            )
