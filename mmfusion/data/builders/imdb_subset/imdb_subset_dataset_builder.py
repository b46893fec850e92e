"""10,000 reviews of the Large Movie Review Dataset (Maas et al., 2011), for machines without a network."""

import csv
import gzip
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mmfusion.data.builders import archives
from mmfusion.errors import UserError

FILE = "imdb_subset/reviews.csv.gz"
DIGEST = "1b5db8e3f2489cbf7ab94c54b01ccb0376678d27a3422fc8e82d239a3cf9cab5"  # SHA-256 of the CSV
LIMIT = 2**26  # maximum decompressed size in bytes, four times the actual size


class Builder(tfds.core.GeneratorBasedBuilder):
    """5,000 reviews of the official train and 5,000 of the official test split, half of each positive.

    Features: `text`, `label` (neg, pos), `group` (the text's digest, as some reviews occur twice), `id`.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {FILE} here: official_split, id, label and text of each review."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://ai.stanford.edu/~amaas/data/sentiment/",
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=("neg", "pos")),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = archives.manual_file(dl_manager, FILE)
        try:
            with gzip.open(path) as file:
                data = file.read(LIMIT)
        except (OSError, EOFError) as error:
            raise UserError(f"the file is corrupt ({error})", path=str(path)) from error
        if hashlib.sha256(data).hexdigest() != DIGEST:
            raise UserError(f"not the known file: its SHA-256 is not {DIGEST[:12]}...", path=str(path))
        rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
        return {
            split: self._generate_examples([row for row in rows if row["official_split"] == split])
            for split in ("train", "test")
        }

    def _generate_examples(self, rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in rows:
            name = f"{row['official_split']}-{row['id']}"
            group = hashlib.sha256(row["text"].encode()).hexdigest()[:16]
            yield name, {"text": row["text"], "label": int(row["label"]), "group": group, "id": name}
