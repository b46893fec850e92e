"""What the features of a dataset hold, so that no modality or target is read from a feature of another type."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epy

from mmfusion.data.modality_type import ModalityType
from mmfusion.errors import UserError

with epy.lazy_imports():
    import tensorflow_datasets as tfds

DESCRIPTIONS = {
    "image": "an image", "audio": "audio", "bytes": "bytes", "classes": "a list of classes", "texts": "a list of texts",
    "images": "a list of images", "other": "something else",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Feature:
    """What one feature of a dataset holds.

    Attributes:
      form: `image`, `audio`, `video`, `text`, `bytes`, `class`, `number`, `array[RANK]`, `classes` (a sequence of class
        features), `texts`, `images`, or `other`. A sequence of numbers is an array whose first size is unknown.
      dtype: of numbers and arrays, a NumPy name.
      shape: of arrays; None where it differs between rows.
      class_names: of `class` and `classes`.
    """

    form: str
    dtype: str = ""
    shape: tuple[int | None, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def is_sequence(self) -> bool:
        """Whether the number of its elements differs between rows."""
        return self.form == "classes" or self.shape[:1] == (None,)

    def __str__(self) -> str:
        if self.form.startswith("array"):
            sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
            return f"an array {self.dtype} [{sizes}]"
        return DESCRIPTIONS.get(self.form, f"a {self.form}")


def from_tfds(features: "tfds.features.FeaturesDict") -> dict[str, Feature]:
    """Returns what the features of a TFDS dataset hold; nested features are named `OUTER/INNER`."""
    result: dict[str, Feature] = {}
    for name, feature in features.items():
        inner = getattr(feature, "feature", None)  # of a sequence
        if isinstance(feature, tfds.features.FeaturesDict):
            result |= {f"{name}/{key}": spec for key, spec in from_tfds(feature).items()}
        elif isinstance(inner, tfds.features.FeaturesDict):
            result |= {f"{name}/{key}": _sequence(spec, None) for key, spec in from_tfds(inner).items()}
        else:
            result[name] = _feature(feature)
    return result


def flatten(row: Mapping[str, Any], features: Mapping[str, Feature]) -> dict[str, Any]:
    """Returns a row with the values of nested features under their names `OUTER/INNER`."""
    if features.keys() <= row.keys():
        return dict(row)
    result: dict[str, Any] = {}
    for name, value in row.items():
        if name not in features and isinstance(value, Mapping):
            inner = {key.removeprefix(f"{name}/"): spec for key, spec in features.items() if key.startswith(f"{name}/")}
            result |= {f"{name}/{key}": item for key, item in flatten(value, inner).items()}
        else:
            result[name] = value
    return result


def _feature(feature: Any) -> Feature:
    f = tfds.features
    if isinstance(feature, f.ClassLabel):
        return Feature("class", class_names=tuple(feature.names) if feature.num_classes is not None else ())
    for kind, form in ((f.Image, "image"), (f.Audio, "audio"), (f.Video, "video"), (f.Text, "text")):
        if isinstance(feature, kind):
            return Feature(form)
    if isinstance(feature, f.Sequence):
        return _sequence(_feature(feature.feature), getattr(feature, "_length", None))
    if not isinstance(feature, f.Tensor):
        return Feature("other")
    stored: Any = feature  # TFDS's annotations allow trees of dtypes and shapes
    dtype, shape = np.dtype(stored.np_dtype), tuple(stored.shape)
    if dtype.kind in "OSU":
        return Feature("texts" if shape else "bytes")
    return Feature(f"array[{len(shape)}]" if shape else "number", dtype.name, shape)


def _sequence(inner: Feature, length: int | None) -> Feature:
    if inner.form in ("class", "text", "bytes", "image"):
        plural = {"class": "classes", "image": "images"}.get(inner.form, "texts")
        return Feature(plural, class_names=inner.class_names)
    if inner.form == "number" or inner.form.startswith("array"):
        shape = (length, *inner.shape)
        return Feature(f"array[{len(shape)}]", inner.dtype, shape)
    return Feature("other")


def check_takes(feature: Feature, kind: str, types: Mapping[str, ModalityType], path: str, value: str) -> None:
    """Checks that a modality type can be read from a feature.

    Args:
      feature: what the feature holds.
      kind: the modality type's name.
      types: the modality types by name; one without `takes` takes everything.
      path: the config key that names the feature, for the error message.
      value: the feature's name.

    Raises:
      UserError: it cannot; the message names the modality types that can.
    """
    if kind not in types or not types[kind].takes or feature.form in (*types[kind].takes, "other"):
        return
    others = ", ".join(name for name, other in types.items() if feature.form in other.takes)
    message = f"holds {feature}, which the modality type {kind!r} does not take"
    raise UserError(f"{message}; types that do: {others or 'none'}", path=path, value=value)
