"""A trained model with its metrics, predictions, features and attention weights."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion.data import dataset as datasets
from mmfusion.data import sources
from mmfusion.data.decoding import Reader, empty_batch
from mmfusion.data.split import Split
from mmfusion.data.summary import count_unknown
from mmfusion.data.table_dataset import is_table
from mmfusion.data.trust import name_place
from mmfusion.errors import UserError
from mmfusion.inference import rows as input_rows
from mmfusion.inference.calibration import load_calibration
from mmfusion.inference.contributions import needed_subsets
from mmfusion.inference.explanations import Explainer, Explanation
from mmfusion.inference.predictions import Predictions, Uncertainty, predictions, uncertainties
from mmfusion.inference.representations import Attention, Features, compile_inspect_step, nan_where_bad
from mmfusion.inference.rows import Row
from mmfusion.training.calibration import Calibration
from mmfusion.training.evaluation import collect, score, without
from mmfusion.training.restore import Run, open_run, trust_run

SPLITS = ("train", "valid", "test")
SMALL_BATCH = 8  # rows; on CPU, programs for fewer round in another way than those of larger batches


class TrainedModel:
    """A trained run at its best checkpoint, as returned by `load`.

    Rows are mappings keyed by modality or feature name, like the columns of the `predict` command. A value is an array
    (uint8 pixels `[H, W, C]`, samples `[S]`, a vector, ...), encoded bytes, a file path (images, audio, video), a list
    of paths (several images) or text. A modality without a value is absent; other keys are ignored. An unreadable row
    has an entry in `errors` and does not affect other rows.

    Args:
      run: the opened run.
      small_batch: size to which a call of fewer rows is padded, by a program of its own; 0: to the config's batch size.
    """

    def __init__(self, run: Run, small_batch: int = SMALL_BATCH):
        self._run, self._small_batch = run, small_batch
        self._splits: dict[str, Split] = dict(run.dataset.splits)

    @property
    def config(self) -> ConfigDict:
        """The run's config, locked."""
        return self._run.config_dict

    @property
    def reader(self) -> Reader:
        """The modalities with their options and fitted state."""
        return self._run.dataset.reader

    @property
    def step(self) -> int:
        """The training step of the checkpoint."""
        return self._run.step

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The parameters as a tree of NumPy arrays."""
        return self._run.setup.partitioner.to_host(self._run.state.params)

    def evaluate(
        self,
        split: str = "test",
        modalities: Collection[str] | None = None,
        *,
        data: str = "",
        data_dir: str | Path = "",
    ) -> dict[str, Any]:
        """Returns the metrics on a split of the run's dataset, or of another one with the same features and classes.

        Rows that have none of the modalities do not count, as `predict` has an error for them.

        Args:
          split: `train`, `valid` or `test`, loaded on first use; of another dataset a split expression, `test[:50%]`.
          modalities: modalities to keep; the others count as absent in every row. None keeps all.
          data: the name of another dataset; empty: the run's own.
          data_dir: where the other dataset is prepared; empty: where that of the run is.

        Returns:
          `data`, `split`, `modalities`, `step`, the number of `rows` and of those that count as `examples`, and the
          metrics of `result.json`: `accuracy`, `loss`, ...

        Raises:
          UserError: no such split or modality, the dataset cannot be opened or has other classes, the split has no
            labels, or no row counts.
        """
        config, setup = self._run.config, self._run.setup
        check_request(config.data.modalities, split if not data else SPLITS[0], modalities)
        if data:
            rows = self._other_split(data, str(data_dir), split)
        elif split not in self._splits:
            dataset = datasets.load(config.data, seed=config.seed, splits=(split,), saved=self._run.dataset.saved())
            self._splits |= dataset.splits
        rows = rows if data else self._splits[split]
        if not rows.has_labels:
            message = f"has no label in any row of {data or config.data.name!r}; it can be predicted, not evaluated"
            raise UserError(message, path="split", value=split)
        collected = collect(
            self._eval_step,
            self._run.state,
            rows,
            setup,
            batch_size=config.batch_size,
            workers=config.data.workers,
            modalities=modalities,
            max_bad_fraction=config.data.max_bad_fraction,
        )
        kept = sorted(config.data.modalities if modalities is None else modalities)
        scores = score(collected, setup.tasks, skip_empty=True)
        if not scores["examples"]:
            raise UserError(f"none of the {scores['rows']} rows of {split!r} has any", path="modalities", value=kept)
        name = data or self._run.dataset.name
        return {"data": name, "split": split, "modalities": kept, "step": self.step, **scores}

    def _other_split(self, name: str, data_dir: str, expression: str) -> Split:
        """Returns a split of another dataset, read as the run's own."""
        config = self._run.config
        for place in filter(None, (data_dir, name if is_table(name) else "")):
            name_place(place)
        data = dataclasses.replace(
            config.data,
            name=name,
            fallback_name="",
            dir=data_dir or config.data.dir,
            test=expression,
            test_fraction=1.0,
            folds=0,
            fold_by="",
            time="",
        )
        if not is_table(name):
            sources.check_name(name, data.dir)
        saved = {**self._run.dataset.saved(), "name": name}
        return datasets.load(data, seed=config.seed, splits=("test",), saved=saved).splits["test"]

    def predict(
        self,
        rows: Iterable[Row],
        folder: str | Path = ".",
        *,
        calibrated: bool = True,
        intervals: float | None = None,
        sets: float | None = None,
        contributions: bool = False,
    ) -> Predictions:
        """Returns labels and probabilities, or values, for rows; a row whose output is not finite has an error.

        Args:
          rows: see the class docstring.
          folder: the folder that file paths are relative to.
          calibrated: whether probabilities are calibrated with the temperature fitted on validation; labels are the
            same with and without it.
          intervals: coverage, such as 0.9, of intervals for regression tasks, split-conformal on validation.
          sets: coverage of sets of classes for classification tasks, split-conformal on validation.
          contributions: whether to compute each modality's contribution to each prediction, see `contributions.py`.

        Raises:
          UserError: no row has a modality of the model, or a key is a misspelt modality that every row lacks; or the
            run cannot be calibrated, or has too few validation examples for a coverage.
        """
        rows = self._checked(rows)
        uncertainty = self._uncertainties(calibrated, intervals, sets)
        names = tuple(sorted(self._run.config.data.modalities))
        subsets = needed_subsets(names) if contributions else [names]
        unknown: Counter = Counter()
        outputs, errors = self._apply(self._eval_step, rows, folder, ("logits",), subsets, unknown)
        logits = {kept: output["logits"] for kept, output in zip(subsets, outputs, strict=True)}
        found = predictions(logits, self._run.setup.tasks, self._run.dataset.class_names, errors, uncertainty)
        keys = {key[:2] for key in unknown}
        return dataclasses.replace(found, unknown={key: (unknown[*key, 0], unknown[*key, 1]) for key in sorted(keys)})

    def features(self, rows: Iterable[Row], folder: str | Path = ".") -> Features:
        """Returns the fused features and each modality's embedding; for arguments and errors see `predict`."""
        (outputs,), errors = self._apply(
            self._inspect_step, self._checked(rows), folder, keep=("fused", "pooled", "present")
        )
        return Features(
            nan_where_bad(outputs["fused"], errors),
            nan_where_bad(outputs["pooled"], errors),
            outputs["present"],
            errors,
        )

    def attention(self, rows: Iterable[Row], folder: str | Path = ".") -> Attention:
        """Returns the attention weights of the fusion strategy; for arguments and errors see `predict`.

        Weights of absent modalities and of padded positions are zero.
        """
        (outputs,), errors = self._apply(self._inspect_step, self._checked(rows), folder, keep=("attention",))
        return Attention(nan_where_bad(outputs["attention"], errors), errors)

    def explain(self, rows: Iterable[Row], folder: str | Path = ".") -> list[Explanation]:
        """Returns what each row's predictions are attributed to; for arguments and errors see `predict`."""
        return self._explainer.explain(self._checked(rows), folder)

    def _checked(self, rows: Iterable[Row]) -> Sequence[Row]:
        if isinstance(rows, dict):
            raise UserError("must be a sequence of mappings, one per row; got one mapping", path="rows")
        rows = list(rows)
        if rows:
            columns = dict.fromkeys(name for row in rows for name in row)
            input_rows.check_columns(self._run.dataset.reader, list(columns), "rows")
        return rows

    def _apply(
        self,
        step: Callable[..., dict[str, Any]],
        rows: Sequence[Row],
        folder: str | Path,
        keep: Sequence[str],
        subsets: Sequence[Collection[str] | None] = (None,),
        unknown: Counter | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Returns the outputs `keep` of a compiled step for all rows, with each subset of modalities, and the errors.

        Rows are decoded once; None is the subset of all modalities. Unknown values, and all values, are added to
        `unknown` under (modality, what, 0) and (modality, what, 1).
        """
        run, errors = self._run, []
        outputs: list[list[dict[str, Any]]] = [[] for _ in subsets]
        reader, size = run.dataset.reader, self._batch_size(len(rows))
        # Without rows, a batch of padding gives the shapes of the outputs.
        batches = input_rows.batches(reader, rows, size, folder) if rows else [(empty_batch(reader, size), [])]
        for batch, bad in batches:
            count = len(bad)
            if unknown is not None:
                for key, counts in count_unknown(batch, reader).items():
                    unknown.update({(*key, 0): counts[0], (*key, 1): counts[1]})
            for results, kept in zip(outputs, subsets, strict=True):
                device_batch = run.setup.partitioner.put_batch(without(batch, kept))
                output = step(run.state.params, run.state.batch_stats, device_batch)
                kept_outputs = {name: output[name] for name in keep}
                results.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], kept_outputs))
            errors += bad
        return [jax.tree.map(lambda *parts: np.concatenate(parts), *results) for results in outputs], errors

    def _batch_size(self, rows: int) -> int:
        devices, largest = self._run.setup.partitioner.num_devices, self._run.config.batch_size
        small = -(-self._small_batch // devices) * devices  # each device has a row
        return small if 0 < rows <= small < largest else largest

    def _uncertainties(self, calibrated: bool, intervals: float | None, sets: float | None) -> dict[str, Uncertainty]:
        tasks = self._run.setup.tasks
        has_classes = any(spec.kind != "regression" for spec in tasks.values())
        needed = (calibrated and has_classes) or intervals is not None or sets is not None
        calibration = self._calibration if needed else {}
        return uncertainties(tasks, calibration, calibrated=calibrated and needed, intervals=intervals, sets=sets)

    @functools.cached_property
    def _calibration(self) -> dict[str, Calibration]:
        return load_calibration(self._run)

    @functools.cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self._run)

    @functools.cached_property
    def _eval_step(self) -> Callable[..., dict[str, Any]]:
        return self._run.setup.compile_eval_step()

    @functools.cached_property
    def _inspect_step(self) -> Callable[..., dict[str, Any]]:
        return compile_inspect_step(self._run.setup)


def load(workdir: str | Path, *, data_dir: str | Path | None = None, trust: bool = False) -> TrainedModel:
    """Opens a trained run at its best checkpoint.

    A run of someone else may name code to import and places to read data from; see `trust`.

    Args:
      workdir: the run's directory, local or in a bucket (`gs://...`).
      data_dir: the folder of its prepared dataset on this machine; None: the run's own. It is only read by `evaluate`,
        and for models whose vocabularies are files.
      trust: accept the code and the places that its config names, also later. Those of your own runs are accepted.

    Raises:
      UserError: no run, no checkpoint, a checkpoint of another architecture, or code that is not trusted.
    """
    if trust:
        trust_run(workdir)

    def set_data_dir(config: ConfigDict) -> None:
        if data_dir is not None:
            config.data.dir = str(data_dir)
            name_place(str(data_dir))

    return TrainedModel(open_run(workdir, (), set_data_dir))


def check_request(known: Collection[str], split: str, modalities: Collection[str] | None) -> None:
    """Raises UserError for a split or a modality that a run does not have."""
    if split not in SPLITS:
        raise UserError("no such split", path="split", value=split, choices=SPLITS)
    for m in modalities or ():
        if m not in known:
            raise UserError("the run has no such modality", path="modality", value=m, choices=known)
