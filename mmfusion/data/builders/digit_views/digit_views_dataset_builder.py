"""Multiple Features: 2,000 handwritten digits with six feature sets each (Duin, 1998; UCI, CC BY 4.0)."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmfusion.data.builders import archives

FILE = "handwritten_views/handwritten6.npz"
DIGEST = "066c71a1276717c90dbe3b41063b517acecbd3006d3fffe86b53ffcf50560287"  # SHA-256
VIEWS = {"pix": 240, "fou": 76, "fac": 216, "zer": 47, "kar": 64, "mor": 6}  # feature set -> its size


class Builder(tfds.core.GeneratorBasedBuilder):
    """Pixel means, Fourier coefficients, profile correlations, Zernike moments, Karhunen-Loeve and shape features.

    Features: `pix`, `fou`, `fac`, `zer`, `kar`, `mor` (float vectors), `label`, `group` and `id`. 1,600 train and 400
    test examples, in the split of the repository of TMC (Han et al. 2021).
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Put {FILE} here."

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://archive.ics.uci.edu/dataset/72/multiple+features",
            features=tfds.features.FeaturesDict(
                {
                    **{view: tfds.features.Tensor(shape=(size,), dtype=np.float32) for view, size in VIEWS.items()},
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        data = archives.read_manual_file(dl_manager, FILE, DIGEST)
        arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
        return {split: self._generate_examples(arrays, split) for split in ("train", "test")}

    def _generate_examples(self, arrays: dict[str, np.ndarray], split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, label in enumerate(arrays[f"label_{split}"]):
            name = f"{split}-{number:04d}"
            views = {view: arrays[f"{view}_{split}"][number] for view in VIEWS}
            yield name, {**views, "label": int(label), "group": name, "id": name}
