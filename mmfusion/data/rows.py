"""One raw row -> fixed-shape arrays per modality and target, the same for training, evaluation and prediction."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mmfusion.data import audio, image, text
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError

Options = Mapping[str, Any]


class BadRow(ValueError):
    """A row that cannot be read: a corrupt picture or sound, a value of the wrong kind; it is quarantined."""


class BadTarget(ValueError):
    """A target that would train silently wrong (a label outside the classes, a value that is not finite)."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Turns raw rows into arrays.

    Attributes:
      modalities: per modality its options: `kind`, `feature` and the kind's own (see `configs/base.py`).
      targets: per task `kind` and `feature`.
      outputs: per task the number of classes, 1 for regression.
      tokenizers: per text modality.
    """

    modalities: Mapping[str, Options]
    targets: Mapping[str, Options]
    outputs: Mapping[str, int]
    tokenizers: Mapping[str, Tokenizer]

    def shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype, int]]:
        """Returns per modality the shape of one input, its dtype, and its number of positions."""
        return {name: KINDS[o["kind"]].shape(o) for name, o in self.modalities.items()}

    def bytes_per_row(self) -> int:
        """Returns the memory of one row once decoded, in bytes."""
        return sum(int(np.prod(s)) * np.dtype(d).itemsize + n for s, d, n in self.shapes().values())

    def read(self, row: Mapping[str, Any], number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `{modality: (input, mask) or None where absent}` and `{task: target}`.

        Raises:
          BadRow: the row's data cannot be read.
          BadTarget: a target is outside its classes or not finite.
        """
        values = {}
        for name, options in self.modalities.items():
            try:
                values[name] = KINDS[options["kind"]].read(row[options["feature"]], options, self.tokenizers.get(name))
            except (ValueError, OSError) as error:
                raise BadRow(f"row {number}, {name}: {error}") from error
        targets = {}
        for task, options in self.targets.items():
            try:
                targets[task] = TARGETS[options["kind"]](row[options["feature"]], self.outputs[task])
            except ValueError as error:
                raise BadTarget(f"row {number}, target {task!r}: {error}") from error
        return values, targets


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one kind of modality is read.

    Attributes:
      shape: options -> (input shape, dtype, positions).
      read: (value, options, tokenizer) -> (input, mask), or None where the value is absent.
      options: the kind's config keys and their defaults.
    """

    shape: Callable[[Options], tuple[tuple[int, ...], Any, int]]
    read: Callable[[Any, Options, Any], tuple[np.ndarray, np.ndarray] | None]
    options: dict[str, Any]


def _image_shape(options: Options) -> tuple[tuple[int, ...], Any, int]:
    return (*options["size"], options["channels"]), np.uint8, 1


def _read_image(value: Any, options: Options, _: None) -> tuple[np.ndarray, np.ndarray] | None:
    if value is None or len(value) == 0:
        return None
    return image.decode(value, tuple(options["size"]), options["channels"]), np.ones(1, bool)


def _text_shape(options: Options) -> tuple[tuple[int, ...], Any, int]:
    return (options["length"],), np.int32, options["length"]


def _read_text(value: Any, options: Options, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray] | None:
    ids, mask = text.encode(tokenizer, [as_string(value)], options["length"])
    return (ids[0], mask[0]) if mask.any() else None


def _audio_shape(options: Options) -> tuple[tuple[int, ...], Any, int]:
    samples = round(options["seconds"] * options["rate"])
    return (samples,), np.float32, samples


def _read_audio(value: Any, options: Options, _: None) -> tuple[np.ndarray, np.ndarray] | None:
    if value is None or len(value) == 0:
        return None
    waveform, mask = audio.pad(
        audio.decode(value, options["rate"], source_rate=options["stored_rate"] or None),
        round(options["seconds"] * options["rate"]),
    )
    return (waveform, mask) if mask.any() else None


IMAGE_OPTIONS = {
    "size": (32, 32),  # (H, W) in pixels; a picture of another size is resized
    "channels": 3,
    "mean": (0.5,),  # per channel, or one for all; of pixels in [0, 1]
    "std": (0.25,),
    "augment": dict(image.AUGMENT),  # applied on the device, to training batches only
}
TEXT_OPTIONS = {
    "tokenizer": "word",  # or "bpe"
    "vocabulary_size": 5000,  # the most ids there may be, with padding and out-of-vocabulary
    "length": 32,  # tokens; longer texts are cut, shorter ones padded at the end
}
AUDIO_OPTIONS = {
    "rate": 8000,  # Hz; recordings of another rate are resampled
    "stored_rate": 0,  # Hz, of recordings stored as bare samples; 0: the same as `rate`
    "seconds": 1.0,  # longer recordings are cut, shorter ones padded at the end
}

KINDS: dict[str, Kind] = {
    "image": Kind(_image_shape, _read_image, IMAGE_OPTIONS),
    "text": Kind(_text_shape, _read_text, TEXT_OPTIONS),
    "audio": Kind(_audio_shape, _read_audio, AUDIO_OPTIONS),
}


def as_string(value: Any) -> str:
    """Returns a text value as `str`; None is the empty text; raises UserError where it is not one string."""
    if value is None:
        return ""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(value, np.ndarray):
        raise UserError(f"a text or group must be one string, got an array {value.dtype}{list(value.shape)}")
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _read_class(value: Any, classes: int) -> np.ndarray:
    label = np.asarray(value)
    if label.ndim or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"a class must be one whole number, got {value!r}")
    if not 0 <= label < classes:
        raise ValueError(f"class {int(label)} is outside 0 to {classes - 1}")
    return label.astype(np.int32)


def _read_classes(value: Any, classes: int) -> np.ndarray:
    labels = np.asarray(value)
    if labels.dtype == bool and labels.shape == (classes,):  # one truth value a class
        return labels.astype(np.float32)
    if labels.size and not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"classes must be whole numbers, or {classes} truth values, got {value!r}")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(f"classes {labels.tolist()} are outside 0 to {classes - 1}")
    hot = np.zeros(classes, np.float32)
    hot[labels] = 1
    return hot


def _read_number(value: Any, _: int) -> np.ndarray:
    number = np.asarray(value, np.float32)
    if number.ndim or not np.isfinite(number):
        raise ValueError(f"a regression target must be one finite number, got {value!r}")
    return number


CLASS_OPTIONS = {
    "classes": 0,  # 0: as many as the dataset names
    "label_smoothing": 0.0,
    "class_weights": (),  # one weight a class; empty: all 1
    "weight": 1.0,  # of this task's mean loss in the sum over tasks
}
TARGETS = {"classification": _read_class, "multilabel": _read_classes, "regression": _read_number}
TARGET_OPTIONS: dict[str, dict[str, Any]] = {
    "classification": CLASS_OPTIONS,
    "multilabel": CLASS_OPTIONS,
    "regression": {"loss": "mse", "weight": 1.0},  # loss: mse, mae or huber
}


def empty_batch(reader: Reader, size: int) -> Batch:
    """Returns a batch of `size` padding rows, NumPy arrays to be filled."""
    shapes = reader.shapes()
    target_shape = {
        task: (size, reader.outputs[task]) if options["kind"] == "multilabel" else (size,)
        for task, options in reader.targets.items()
    }
    return Batch(
        inputs={m: np.zeros((size, *shape), dtype) for m, (shape, dtype, _) in shapes.items()},
        mask={m: np.zeros((size, positions), bool) for m, (_, _, positions) in shapes.items()},
        present={m: np.zeros(size, bool) for m in shapes},
        targets={
            task: np.zeros(target_shape[task], np.int32 if options["kind"] == "classification" else np.float32)
            for task, options in reader.targets.items()
        },
        weight=np.zeros(size, np.float32),
        id=np.full(size, -1, np.int32),
    )


def fill_row(batch: Batch, place: int, row: Mapping[str, Any], number: int, reader: Reader) -> None:
    """Reads `row` into place `place` of a batch that `empty_batch` made.

    Raises:
      BadRow: the row's data cannot be read; the place is left as padding.
      BadTarget: a target is outside its classes or not finite.
    """
    values, targets = reader.read(row, number)
    for modality, value in values.items():
        if value is not None:
            batch.inputs[modality][place], batch.mask[modality][place] = value
            batch.present[modality][place] = True
    for task, target in targets.items():
        batch.targets[task][place] = target
    batch.weight[place] = 1
    batch.id[place] = number
