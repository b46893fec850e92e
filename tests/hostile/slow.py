"""What takes minutes in native code that no signal interrupts: a dataset, and a command that trains nothing."""

import hashlib
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from experiments import cli
from mmfusion.distributed.preemption import stop_on_signal


def native() -> None:
    """Computes for minutes without the interpreter's lock, as a compilation does."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)


class Slow(tfds.core.GeneratorBasedBuilder):
    """A dataset that takes minutes to prepare."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 3)),
                    "text": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(num_classes=2),
                }
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        Path(self._data_dir_root, "started").touch()
        native()
        yield 0, {}


def main(argv: list[str]) -> None:
    _, started, stepping = argv
    with stop_on_signal() as stop:
        if stepping == "stepping":
            stop.after_step()
        Path(started).touch()
        native()


if __name__ == "__main__":
    sys.modules["tests.hostile.slow"] = sys.modules["__main__"]
    cli.run(main)
