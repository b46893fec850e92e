"""A table or arrays of one's own, from Python."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfusion.config import defaults
from mmfusion.config.from_table import Proposal, propose
from mmfusion.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A table of one's own; `mmfusion.train(dataset.config, workdir)` trains on it.

    Attributes:
      path: the table.
      label: its label column, several joined by `+`; empty: label, target, class or y.
      columns: the columns that are inputs; empty: all that are useful.
      task: classification, multilabel or regression; empty: by the label's values.
    """

    path: Path
    label: str = ""
    columns: tuple[str, ...] = ()
    task: str = ""

    @classmethod
    def from_table(
        cls, path: str | os.PathLike, label: str = "", columns: Sequence[str] = (), task: str = ""
    ) -> Dataset:
        """Returns the dataset of a table: CSV, TSV, JSON Lines, JSON, Parquet or NPZ.

        Args:
          path: the table; paths in it are relative to its folder.
          label: see the class.
          columns: see the class.
          task: see the class.

        Raises:
          UserError: the table cannot be read, or has no such column.
        """
        dataset = cls(Path(path).absolute(), label, tuple(columns), task)
        dataset.proposal()
        return dataset

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        path: str | os.PathLike,
        label: str = "",
        columns: Sequence[str] = (),
        task: str = "",
    ) -> Dataset:
        """Writes arrays to a file, from which runs can be resumed and evaluated, and returns their dataset.

        Args:
          arrays: column -> an array or a list with the row on axis 0: images `[n, H, W, C]`, vectors `[n, D]`,
            sequences `[n, T, D]`, numbers, strings. The columns `split` and `group` have the meaning of tables.
          path: the `.npz` file to write; an existing one is replaced.
          label: see the class.
          columns: see the class.
          task: see the class.

        Raises:
          UserError: arrays of Python objects or of different lengths, or no such column.
        """
        path = Path(path)
        if path.suffix != ".npz" or not path.absolute().parent.is_dir():
            raise UserError("must be a file .npz in an existing folder", path="path", value=str(path))
        converted = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in converted.items():
            if array.dtype == object:
                raise UserError("must be an array of numbers or strings, got Python objects", path=f"arrays[{name!r}]")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
        try:
            np.savez(temporary, allow_pickle=False, **converted)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return cls.from_table(path, label, columns, task)

    def proposal(self) -> Proposal:
        """Returns how the columns are read; see `experiments.inspect`."""
        config, _ = defaults.begin("")
        return propose(config, str(self.path), self.label, self.columns, self.task)

    @property
    def config(self) -> str:
        """The config for `mmfusion.train` and `mmfusion.ablate`; arguments may follow, such as `,fusion=gmu`."""
        given = {"data": str(self.path), "label": self.label, "columns": "+".join(self.columns), "task": self.task}
        for name, value in given.items():
            if "," in value:
                raise UserError("must have no comma; rename it", path=name, value=value)
        return "configs/table.py:" + ",".join(f"{name}={value}" for name, value in given.items() if value)
