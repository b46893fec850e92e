"""Proposes a config for a table of one's own, from what its columns hold."""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from ml_collections import ConfigDict
from PIL import Image

from mmfusion.config import defaults
from mmfusion.config.fields import read
from mmfusion.data.opening import fold_numbers
from mmfusion.data.table import canonical
from mmfusion.data.table_dataset import SPLIT_COLUMN, SPLIT_NAMES, TableFile, read_table
from mmfusion.data.table_schema import Column, describe, gives_away, is_missing, parse_list, target_kind
from mmfusion.errors import UserError

ROLES = (SPLIT_COLUMN, "group", "fold")  # columns that are read as such, the last two unless they are chosen as inputs
LABELS = ("label", "target", "class", "y")  # columns that are the label where none is named
SAMPLE = 300  # files whose size is read
EPOCHS, STEPS = 60, (1000, 4000)  # passes over the training rows; bounds of the number of steps
BATCH = 64
MAX_PIXELS, MAX_SECONDS, MAX_RATE, MAX_WORDS, MAX_IMAGES, MAX_STEPS = 64, 10.0, 16_000, 128, 8, 512


@dataclasses.dataclass(frozen=True)
class Proposal:
    """How a table is read.

    Attributes:
      table: the table.
      columns: what each column holds.
      roles: column -> `label`, `split`, `group`, `fold`, the name of its modality, or why it is not read.
    """

    table: TableFile
    columns: dict[str, Column]
    roles: dict[str, str]


def propose(config: ConfigDict, path: str, label: str = "", columns: Sequence[str] = (), task: str = "") -> Proposal:
    """Sets in a config how a table is read and what it is trained with, and returns why.

    Args:
      config: what `defaults.begin` returned; changed in place.
      path: the table, see `data.table_file.open_table`.
      label: the label column, several joined by `+`; empty: a column of the name label, target, class or y.
      columns: the columns that are inputs; empty: all that carry information and do not give the label away.
      task: the type of target; empty: by the label's values.

    Raises:
      UserError: no such table or column, or nothing that could be an input.
    """
    if not path:
        raise UserError("give the table, such as configs/table.py:data=my.csv,label=price", path="config argument data")
    table = read_table(path)
    if not table.rows:
        raise UserError("has no rows", path=path)
    described = describe(table.rows, table.columns, table.path.parent)
    labels = _labels(table, label)
    taken = {*labels, *columns} - {SPLIT_COLUMN}
    roles = dict.fromkeys(labels, "label") | {name: name for name in ROLES if name in described and name not in taken}
    if "fold" in roles and described["fold"].distinct < 2:
        roles["fold"] = "not read: it has one value"
    for name in columns:
        if name not in described:
            raise UserError("no such column", path="columns", value=name, choices=described)
    inputs = {}
    for name, column in described.items():
        if name in roles or (columns and name not in columns):
            roles.setdefault(name, "not chosen")
        elif reason := _unusable(table, column, labels, chosen=bool(columns)):
            roles[name] = f"not read: {reason}"
        else:
            inputs[name] = column
    if not inputs:
        raise UserError("has no column that could be an input", path=path)
    modalities = _modalities(inputs)
    roles |= {name: modality for modality, members in modalities.items() for name in members}
    _set(config, table, described, labels, modalities, task, roles)
    return Proposal(table, described, roles)


def _labels(table: TableFile, label: str) -> list[str]:
    names = label.split("+") if label else [name for name in table.columns if name.lower() in LABELS][:1]
    if not names:
        raise UserError("name the label's column", path="label", value=label, choices=table.columns)
    for name in names:
        if name not in table.columns:
            raise UserError("no such column", path="label", value=name, choices=table.columns)
    return names


def _unusable(table: TableFile, column: Column, labels: Sequence[str], chosen: bool) -> str:
    """Returns why a column is no input; empty if it is one."""
    if column.problem:
        raise UserError(f"{column.problem}; correct the paths, or leave the column out", path=f"column {column.name}")
    if column.kind in ("identifier", "constant", "empty", "labels"):
        return f"{column.kind}, {column.about}"
    if not chosen and column.kind == "category" and _names_splits(table, column.name):
        return "it names splits"
    if not chosen and any(gives_away(table.rows, column, label) for label in labels):
        return f"it tells {' or '.join(labels)} of nearly every row; name it in columns= to read it"
    return ""


def _names_splits(table: TableFile, name: str) -> bool:
    return {canonical(row[name]).lower() for row in table.rows} <= {*SPLIT_NAMES, ""}


def _modalities(inputs: Mapping[str, Column]) -> dict[str, list[str]]:
    """Returns the columns of each modality; numbers, categories and dates are one, a table."""
    in_table = [name for name, column in inputs.items() if column.kind in ("number", "category", "date")]
    result: dict[str, list[str]] = {"table": in_table} if in_table else {}
    for name, column in inputs.items():
        if name not in in_table:
            result[_modality_name(name, column.kind, result)] = [name]
    return result


def _modality_name(column: str, kind: str, taken: Mapping[str, Any]) -> str:
    """Returns a name that modalities may have, lower-case letters and digits: the column's, or its kind's."""
    plain = re.sub("[^a-z0-9]", "", column.lower())
    plain = plain if re.match("[a-z]", plain) else kind
    name, number = plain, 2
    while name in taken:
        name, number = f"{plain}{number}", number + 1
    return name


def _set(
    config: ConfigDict,
    table: TableFile,
    columns: Mapping[str, Column],
    labels: Sequence[str],
    modalities: Mapping[str, Sequence[str]],
    task: str,
    roles: Mapping[str, str],
) -> None:
    data = config.data
    data.name = str(table.path)
    splits = [SPLIT_NAMES.get(canonical(row[SPLIT_COLUMN]).lower()) for row in table.rows if SPLIT_COLUMN in row]
    data.valid = "valid" if "valid" in splits else ""
    data.group = "group" if roles.get("group") == "group" and not data.valid else ""
    for name in labels:
        values = [row[name] for row in table.rows]
        kind = task or target_kind(columns[name], values)
        options: dict[str, Any] = {"classes": 0} if kind == "multilabel" else {}
        if columns[name].kind == "vector":
            options = {"classes": int(columns[name].about.split()[0]), "encoding": "multi_hot"}
        data.targets[_modality_name(name, "label", data.targets)] = defaults.target(kind, name, **options)
    if roles.get("fold") == "fold":
        data.fold_by = "fold"
        data.fold = fold_numbers(read(config).data)[0]
    for modality, names in modalities.items():
        kind = columns[names[0]].kind
        section, encoder = SECTIONS.get(kind, _table)(modality, names, columns, table)
        data.modalities[modality], config.model.encoders[modality] = section, encoder
    rows = splits.count("train") or round(len(table.rows) * 0.72)
    config.batch_size = 2 ** int(np.log2(np.clip(rows // 10, 8, BATCH)))
    config.steps = int(np.clip(EPOCHS * rows / config.batch_size, *STEPS))
    config.eval_every = config.checkpoint_every = max(1, config.steps // 10)
    config.optim = defaults.optimizer("adamw", 1e-3, schedule_options={"warmup_steps": min(100, config.steps // 10)})
    task_name, target = next(iter(data.targets.items()))
    metric = "rmse" if target.kind == "regression" else "accuracy"
    config.select = metric if len(data.targets) == 1 else f"{task_name}/{metric}"


def _values(table: TableFile, name: str) -> list[Any]:
    """Returns at most `SAMPLE` evenly spaced values of a column."""
    values = [row[name] for row in table.rows if not is_missing(row[name])]
    return [values[int(i)] for i in np.linspace(0, len(values) - 1, min(SAMPLE, len(values))).round()]


GREY = ("L", "1", "I", "I;16", "I;16B", "F")  # Pillow's modes of one channel
Sections = tuple[ConfigDict, ConfigDict]


def _image(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    sizes, channels = [], 1
    for value in _values(table, names[0]):
        if isinstance(value, np.ndarray):
            sizes.append(value.shape[1::-1])
            channels = max(channels, *value.shape[2:])
            continue
        with contextlib.suppress(OSError), Image.open(Path(table.path.parent, value)) as image:
            sizes.append(image.size)
            channels = max(channels, 1 if image.mode in GREY else 3)
    if not sizes:
        raise UserError("no image can be read", path=f"column {names[0]}")
    width, height = np.median(sizes, axis=0)
    scale = min(1.0, MAX_PIXELS / max(width, height))
    size = (max(8, round(height * scale)), max(8, round(width * scale)))
    section = defaults.modality("image", names[0], size=size, channels=channels)
    return section, defaults.encoder(modality, "cnn", norm="batch")


def _images(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    lists = [parse_list(value) for value in _values(table, names[0])]
    with Image.open(Path(table.path.parent, lists[0][0])) as image:
        scale = min(1.0, MAX_PIXELS / max(image.size))
        size = (round(image.height * scale), round(image.width * scale))
    section = defaults.modality("images", names[0], size=size, count=min(max(map(len, lists)), MAX_IMAGES))
    return section, defaults.encoder(modality, "cnn", norm="batch")


def _vector(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    return defaults.modality("embedding", names[0]), defaults.encoder(modality, "mlp")


def _sequence(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    lengths = [len(parse_list(value)) for value in _values(table, names[0])]
    length = int(np.clip(np.quantile(lengths, 0.95), 1, MAX_STEPS))
    return defaults.modality("sequence", names[0], length=length), defaults.encoder(modality, "tcn")


def _audio(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    infos = []
    for value in _values(table, names[0]):
        with contextlib.suppress(soundfile.SoundFileError):
            infos.append(soundfile.info(str(table.path.parent / value)))
    if not infos:
        raise UserError("no recording can be read", path=f"column {names[0]}")
    rate = min(Counter(info.samplerate for info in infos).most_common(1)[0][0], MAX_RATE)
    seconds = float(np.quantile([info.duration for info in infos], 0.95))
    section = defaults.modality("audio", names[0], rate=rate, seconds=round(min(max(seconds, 0.1), MAX_SECONDS), 2))
    return section, defaults.encoder(modality, "logmel_cnn")


def _video(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    return defaults.modality("video", names[0]), defaults.encoder(modality, "video_cnn")


def _text(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    texts = [canonical(value) for value in _values(table, names[0])]
    words = int(np.quantile([len(re.findall(r"\w+|[^\w\s]", text)) for text in texts], 0.95))
    unspaced = np.mean([len(text) for text in texts]) > 8 * max(1, np.mean([len(text.split()) for text in texts]))
    options = {"tokenizer": "bpe", "vocabulary_size": 3000} if unspaced else {}
    length = int(np.clip(words if not unspaced else max(map(len, texts)), 4, MAX_WORDS))
    section = defaults.modality("text", names[0], length=length, **options)
    return section, defaults.encoder(modality, "bow" if length > 64 else "rnn")


def _table(modality: str, names: Sequence[str], columns: Mapping[str, Column], table: TableFile) -> Sections:
    kinds = {kind: tuple(name for name in names if columns[name].kind == kind) for kind in ("category", "date")}
    options = {"categorical": kinds["category"], "dates": kinds["date"]}
    section = defaults.modality("table", "+".join(names), **options)
    return section, defaults.encoder(modality, "table_mlp")


SECTIONS = {
    "image": _image,
    "images": _images,
    "audio": _audio,
    "video": _video,
    "text": _text,
    "vector": _vector,
    "sequence": _sequence,
}
