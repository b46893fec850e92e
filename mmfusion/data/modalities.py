"""The registry of modality types, and access to a modality's raw value in a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import audio, embedding, graph, image, images, knowledge, sequence, table, text, video
from mmfusion.data.modality_type import ModalityType, Options
from mmfusion.registry import lookup

MODALITY_TYPES: dict[str, ModalityType] = {
    "image": image.TYPE,
    "text": text.TYPE,
    "audio": audio.TYPE,
    "video": video.TYPE,
    "table": table.TYPE,
    "embedding": embedding.TYPE,
    "sequence": sequence.TYPE,
    "images": images.TYPE,
    "graph": graph.TYPE,
    "knowledge": knowledge.TYPE,
}


def modality_type(kind: str, path: str = "kind") -> ModalityType:
    """Returns the modality type of a name.

    Args:
      kind: a key of `MODALITY_TYPES`, or `package.module:TYPE` of any importable module.
      path: the config key of the name, for error messages.

    Raises:
      UserError: unknown name, or the module has no such modality type.
    """
    return lookup(MODALITY_TYPES, kind, path, expected=ModalityType)


def feature_names(options: Options) -> list[str]:
    """Returns the names of the dataset features that a modality is read from."""
    if modality_type(options["kind"]).several_features:
        return options["feature"].split("+")
    return [options["feature"]]


def raw_value(row: Mapping[str, Any], options: Options, class_names: Mapping[str, Sequence[str]]) -> Any:
    """Returns a modality's raw value in a row: the value of one feature, or a dict of several.

    Args:
      row: feature -> raw value.
      options: the modality's section of the config.
      class_names: per class feature, the names of its classes.

    Raises:
      OSError: a file of the row cannot be read.
    """
    kind = modality_type(options["kind"])
    if not kind.several_features:
        value = row[options["feature"]]
        if isinstance(value, OSError):  # the row has it in place of a file that cannot be read
            raise value
        return value
    values = {name: row[name] for name in feature_names(options)}
    if kind.class_names:
        for name in values.keys() & class_names.keys():
            if isinstance(values[name], (int, np.integer)):
                values[name] = class_names[name][values[name]]
    return values
