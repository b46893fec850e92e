"""easy-VQA (Zhou, 2020): questions about images of one shape each, with 13 possible answers."""

import io
import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mmfusion.data.builders import archives
from mmfusion.errors import UserError

ARCHIVE = archives.Archive(
    filename="easy-VQA-master.zip",
    url="https://github.com/vzhou842/easy-VQA/archive/refs/heads/master.zip",
    members=r"easy_vqa/data/(answers\.txt|(train|test)/(questions\.json|images/\d+\.png))",
    count=5_003,
    digest="3ccc21c3a6120ed6df7c8db004a212343fafe121bb1774cf4bfbaaa3b1046294",
)
QUESTIONS = {"train": 38_575, "test": 9_673}
ANSWERS = (
    *("black", "blue", "brown", "circle", "gray", "green", "no", "rectangle"),
    *("red", "teal", "triangle", "yellow", "yes"),
)


class Builder(tfds.core.GeneratorBasedBuilder):
    """The public easy-VQA: 4,000 train and 1,000 test images 64x64x3, 38,575 and 9,673 questions, 13 answers.

    The images are the archive's PNG bytes. The questions about an image form a `group`.

    Features: `image` PNG, `question`, `label` (the answer), `group` (the image), `id`.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"Without a network, put {ARCHIVE.filename} here, from {ARCHIVE.url}"

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage="https://github.com/vzhou842/easy-VQA",
            license="MIT",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="png"),
                    "question": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=ANSWERS),
                    "group": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = archives.locate(ARCHIVE, dl_manager)
        members = archives.read(ARCHIVE, path, archives.check(ARCHIVE, path))
        answers = members["easy_vqa/data/answers.txt"].decode().split()
        if sorted(answers) != list(ANSWERS):
            raise UserError(f"answers.txt lists {sorted(answers)}, expected {list(ANSWERS)}", path=path)
        questions = {split: json.loads(members[f"easy_vqa/data/{split}/questions.json"]) for split in QUESTIONS}
        for split, expected in QUESTIONS.items():
            if len(questions[split]) != expected:
                raise UserError(f"{len(questions[split])} {split} questions, expected {expected}", path=path)
        return {split: self._generate_examples(split, members, questions[split]) for split in QUESTIONS}

    def _generate_examples(
        self, split: str, members: dict[str, bytes], questions: list[tuple[str, str, int]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, (question, answer, image) in enumerate(questions):
            name = f"{split}-{number:05d}"
            yield (
                name,
                {
                    "image": io.BytesIO(members[f"easy_vqa/data/{split}/images/{image}.png"]),
                    "question": question,
                    "label": answer,
                    "group": f"{split}-{image}",
                    "id": name,
                },
            )
