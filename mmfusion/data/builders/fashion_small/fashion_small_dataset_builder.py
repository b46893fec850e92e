"""Product photos with their titles, a subset of Fashion Product Images (Small) (Aggarwal, 2019)."""

import csv
import io
import zipfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mmfusion.data.builders import archives

# File below `manual_dir` -> its SHA-256.
FILES = {
    "fashion_small/images.zip": "18b51a414938602e254072a2903670f0b31d9f107e751214f9e4a0d2eb96ba33",
    "fashion_small/manifest.csv": "5f92f5836e5568c8906def88e24029a995388a652c4d1509c9dcbc4fa2c8af3b",
    "fashion_small/labels.txt": "c60f97284a007a02b3c738cbfbe4efe174588b204a1ebac539b4aa6596e7b1be",
}
ARTICLES = (
    "Backpacks", "Belts", "Caps", "Casual Shoes", "Clutches", "Deodorant", "Dresses", "Earrings", "Flats", "Flip Flops",
    "Formal Shoes", "Handbags", "Heels", "Jackets", "Jeans", "Kurtas", "Lipstick", "Nail Polish",
    "Perfume and Body Mist", "Sandals", "Sarees", "Shirts", "Shorts", "Socks", "Sports Shoes", "Sunglasses", "Sweaters",
    "Sweatshirts", "Ties", "Tops", "Track Pants", "Trousers", "Tshirts", "Wallets", "Watches",
)  # fmt: skip
GENDERS = ("Boys", "Girls", "Men", "Unisex", "Women")
SEASONS = ("Fall", "Spring", "Summer", "Winter")


class Builder(tfds.core.GeneratorBasedBuilder):
    """14,993 photos 60x80 with titles, of 35 types of product; no title is in two splits.

    Seven of the 15,000 rows have no season and are left out.

    Features: `image` JPEG, `title`, `label` (the type of product), `season`, `summer` (no or yes), `gender`, `colour`,
    `usage` and `year` as text, `group` (the title), `id`. Splits: train, valid, test.
    """

    VERSION = tfds.core.Version("1.2.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {', '.join(FILES)} here."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://www.kaggle.com/datasets/paramaggarwal/fashion-product-images-small",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                    "title": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=ARTICLES),
                    "season": tfds.features.ClassLabel(names=SEASONS),
                    "summer": tfds.features.ClassLabel(names=("no", "yes")),
                    "gender": tfds.features.ClassLabel(names=GENDERS),
                    "colour": tfds.features.Text(),
                    "usage": tfds.features.Text(),
                    "year": tfds.features.Text(),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        images, manifest, _ = (archives.read_manual_file(dl_manager, name, digest) for name, digest in FILES.items())
        rows = list(csv.DictReader(io.StringIO(manifest.decode(), newline="")))
        return {
            split: self._generate_examples(images, [row for row in rows if row["split"] == name and row["season"]])
            for split, name in (("train", "train"), ("valid", "val"), ("test", "test"))
        }

    def _generate_examples(self, images: bytes, rows: list[dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        with zipfile.ZipFile(io.BytesIO(images)) as file:
            folder = {name.rpartition("/")[2]: name for name in file.namelist()}
            for row in rows:
                yield (
                    row["id"],
                    {
                        "image": io.BytesIO(file.read(folder[f"{row['id']}.jpg"])),
                        "title": row["title"],
                        "label": row["articleType"],
                        "season": row["season"],
                        "summer": "yes" if row["season"] == "Summer" else "no",
                        "gender": row["gender"],
                        "colour": row["baseColour"],
                        "usage": row["usage"],
                        "year": row["year"],
                        "group": row["title"],
                        "id": row["id"],
                    },
                )
