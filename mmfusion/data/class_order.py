"""Classes that a dataset numbers in another order than a run does: their numbers become the run's, by name."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfusion.data.fitting import Fitted
from mmfusion.data.modality_type import Options
from mmfusion.data.rows import CachedRows, Rows, iterate, uncached
from mmfusion.data.sources import Source
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.config.fields import DataConfig


OUTSIDE = np.iinfo(np.int32).max  # in place of a number that no class has, so that no class of the run has it either


@dataclasses.dataclass(frozen=True)
class RenumberedRows:
    """Rows whose classes have other numbers.

    Attributes:
      rows: the rows as stored.
      numbers: per class feature the new number `[C]` of each class; those that are unknown, -1, stay as they are.
    """

    rows: Rows
    numbers: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {**row, **{name: _renumber(row[name], numbers) for name, numbers in self.numbers.items()}}
            for row in iterate(self.rows, np.array(rows))
        ]


def _renumber(value: Any, numbers: np.ndarray) -> Any:
    classes = np.asarray(value, np.int64)
    known = (classes >= 0) & (classes < len(numbers))
    others = np.where(classes < 0, classes, OUTSIDE)
    renumbered = np.where(known, numbers[np.where(known, classes, 0)], others)
    return renumbered if renumbered.ndim else renumbered[()]


def match(
    config: "DataConfig", tasks: Mapping[str, Options], opened: Mapping[str, Source], fitted: Fitted
) -> dict[str, Source]:
    """Returns sources whose classes have the numbers that they have in a run.

    Args:
      config: the `data` section of a config.
      tasks: per task the options of its target.
      opened: the source of each split.
      fitted: of the run.

    Raises:
      UserError: a source has a class that the run does not know.
    """
    wanted = {name: (f"the feature {name!r}", names) for name, names in fitted.feature_classes.items()}
    for task, names in fitted.class_names.items():
        if names:  # no regression
            wanted[tasks[task]["feature"]] = (f"the target {task!r}", names)
    matched = {id(source): _match(config, source, wanted) for source in opened.values()}
    return {split: matched[id(source)] for split, source in opened.items()}


def _match(config: "DataConfig", source: Source, wanted: Mapping[str, tuple[str, Sequence[str]]]) -> Source:
    numbers = {}
    for feature, (owner, names) in wanted.items():
        found = named_classes(source).get(feature, names)
        if tuple(found) == tuple(names) or (feature not in source.class_names and is_unnamed(names)):
            continue
        if unknown := sorted({*found} - {*names}):
            raise UserError(
                f"{source.version} has the classes {_shortened(found)} of {owner}, and the run was trained on "
                f"{_shortened(names)}: it does not know {_shortened(unknown)}",
                path="config.data.name",
                value=config.name,
            )
        numbers[feature] = np.array([list(names).index(name) for name in found])
    if not numbers:
        return source
    class_names = {name: tuple(wanted[name][1]) if name in numbers else own for name, own in source.class_names.items()}
    return dataclasses.replace(
        source, rows=CachedRows(RenumberedRows(uncached(source.rows), numbers)), class_names=class_names
    )


def named_classes(source: Source) -> dict[str, tuple[str, ...]]:
    """Returns the class names of class features and of sequences of them."""
    lists = {name: each.class_names for name, each in source.features.items() if each.form == "classes"}
    return {**{name: names for name, names in lists.items() if names}, **source.class_names}


def is_unnamed(names: Sequence[str]) -> bool:
    """Returns whether class names are their numbers, as of lists of classes in runs of older versions."""
    return list(names) == [str(i) for i in range(len(names))]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
