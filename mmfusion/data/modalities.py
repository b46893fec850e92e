"""The kinds of modality: how a raw value becomes an array of fixed shape and a mask, and what training rows teach.

H W picture · C channels · T tokens or frames · S samples · F columns or features of a node · N nodes
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import audio, image, knowledge, text
from mmfusion.errors import UserError

Options = Mapping[str, Any]
EDGES = ("pairs", "matrix")
Read = tuple[np.ndarray, np.ndarray] | None  # an input and its mask [N]; None where the value is absent


@dataclasses.dataclass(frozen=True)
class ModalityType:
    """How one kind of modality is read.

    Attributes:
      options: its config keys and their defaults, beside `kind` and `feature`.
      shape: (options, fitted) -> input shape, dtype, positions.
      read: (value, options, fitted) -> the input and its mask, or None where the value is absent.
      fit: (the training rows' values, options) -> what they teach, as a string that is saved with the run; None:
        they teach nothing.
      load: that string -> fitted.
      encoder_kwargs: (options, fitted) -> fields of the modality's encoder that the data decides.
      joined: whether `feature` may name several, joined by `+`, whose values come as a dict.
    """

    options: dict[str, Any]
    shape: Callable[[Options, Any], tuple[tuple[int, ...], Any, int]]
    read: Callable[[Any, Options, Any], Read]
    fit: Callable[[Sequence[Any], Options], str] | None = None
    load: Callable[[str], Any] = str
    encoder_kwargs: Callable[[Options, Any], dict[str, Any]] = lambda options, fitted: {}
    joined: bool = False


def feature_names(options: Options) -> list[str]:
    """Returns the names of a dataset's features that a modality is read from."""
    return options["feature"].split("+") if MODALITY_TYPES[options["kind"]].joined else [options["feature"]]


def raw_value(row: Mapping[str, Any], options: Options, named: Mapping[str, Sequence[str]]) -> Any:
    """Returns a modality's raw value in a row: one feature's, or a dict of several.

    `named` has the names of features that are classes; what is read as knowledge is what they say.
    """
    if not MODALITY_TYPES[options["kind"]].joined:
        return row[options["feature"]]
    values = {name: row[name] for name in feature_names(options)}
    if options["kind"] == "knowledge":
        for name in values.keys() & named.keys():
            if isinstance(values[name], (int, np.integer)):
                values[name] = named[name][values[name]]
    return values


def as_string(value: Any) -> str:
    """Returns a text value as `str`; None is the empty text; raises UserError where it is not one string."""
    if value is None:
        return ""
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(value, np.ndarray):
        raise UserError(f"a text or group must be one string, got an array {value.dtype}{list(value.shape)}")
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _read_image(value: Any, options: Options, _: None) -> Read:
    if value is None or len(value) == 0:
        return None
    return image.decode(value, tuple(options["size"]), options["channels"]), np.ones(1, bool)


def _read_text(value: Any, options: Options, fitted: Any) -> Read:
    ids, mask = text.encode(fitted, [as_string(value)], options["length"])
    return (ids[0], mask[0]) if mask.any() else None


def _audio_shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    samples = round(options["seconds"] * options["rate"])
    return (samples,), np.float32, samples


def _read_audio(value: Any, options: Options, _: None) -> Read:
    if value is None or len(value) == 0:
        return None
    waveform, mask = audio.pad(
        audio.decode(value, options["rate"], source_rate=options["stored_rate"] or None),
        round(options["seconds"] * options["rate"]),
    )
    return (waveform, mask) if mask.any() else None


def _read_video(value: Any, options: Options, _: None) -> Read:
    """Takes frames as pixels `[t, H, W, C]`, as encoded pictures, or as one animated picture's bytes."""
    if value is None or len(value) == 0:
        return None
    most, size, channels = options["frames"], tuple(options["size"]), options["channels"]

    def spread(count: int) -> list[int]:
        # Of a longer video as many, evenly spread from the first to the last; a shorter one is padded at the end.
        return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()

    if isinstance(value, bytes):
        frames = image.decode_film(value, spread, size, channels)
    else:
        frames = [image.decode(value[i], size, channels) for i in spread(len(value))]
    pixels = np.zeros((most, *size, channels), np.uint8)
    pixels[: len(frames)] = frames
    return pixels, np.arange(most) < len(frames)


def _numbers(value: Any) -> np.ndarray:
    """Returns a feature's numbers `[n]` float32, NaN where one is missing."""
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return np.array([np.nan], np.float32)
    return np.asarray(value, np.float32).reshape(-1)


def _fit_table(values: Sequence[Mapping[str, Any]], options: Options) -> str:
    """Means and deviations of numbers, and the categories from the most frequent on, ties in their own order."""
    columns = {}
    for name in options["feature"].split("+"):
        if name in options["categorical"]:
            counts = Counter(as_string(row[name]) for row in values)
            columns[name] = {"categories": sorted(set(counts) - {""}, key=lambda one: (-counts[one], one))}
            continue
        widths = {_numbers(row[name]).size for row in values} - {1} or {1}
        if len(widths) > 1:
            raise UserError(
                f"column {name!r} holds {sorted(widths)} numbers in different rows; it must be as many in all"
            )
        width = widths.pop()
        rows = [_numbers(row[name]) for row in values]
        rows = np.array([row if row.size == width else np.full(width, np.nan) for row in rows], np.float64)
        real = np.isfinite(rows)
        count = np.maximum(real.sum(axis=0), 1)
        mean = np.where(real, rows, 0).sum(axis=0) / count
        std = np.sqrt((np.where(real, rows - mean, 0) ** 2).sum(axis=0) / count)
        columns[name] = {"mean": mean.tolist(), "std": np.where(std > 1e-8, std, 1.0).tolist()}
    return json.dumps(columns)


def _categories(options: Options, fitted: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns of each column how many categories it has, the unknown one counted; 0 of numbers."""
    sizes: list[int] = []
    for column in fitted.values():
        sizes += [len(column["categories"]) + 1] if "categories" in column else [0] * len(column["mean"])
    return tuple(sizes)


def _table_shape(options: Options, fitted: Mapping[str, Any]) -> tuple[tuple[int, ...], Any, int]:
    count = len(_categories(options, fitted))
    return (count,), np.float32, count


def _read_table(value: Mapping[str, Any], options: Options, fitted: Mapping[str, Any]) -> Read:
    """Numbers standardised by training's; a category's number from 1 on, 0 where training had none of it."""
    parts = []
    for name, column in fitted.items():
        if "categories" in column:
            word = as_string(value[name])
            known = column["categories"].index(word) + 1 if word in column["categories"] else 0
            parts.append(np.array([known if word else np.nan]))
        else:
            numbers = _numbers(value[name])
            if numbers.size == 1 and np.isnan(numbers[0]):
                numbers = np.full(len(column["mean"]), np.nan)
            if numbers.size != len(column["mean"]):
                raise ValueError(f"column {name!r} holds {numbers.size} numbers, not {len(column['mean'])}")
            parts.append((numbers - column["mean"]) / column["std"])
    row = np.concatenate(parts).astype(np.float32)  # [F]
    mask = np.isfinite(row)
    return (np.where(mask, row, 0), mask) if mask.any() else None


def _graph_shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    return (options["nodes"], options["features"] + options["nodes"]), np.float32, options["nodes"]


def _read_graph(value: Mapping[str, Any], options: Options, _: None) -> Read:
    """Takes nodes `[n, F]`, and edges as pairs `[e, 2]`, each both ways, or as a matrix of weights `[n, n]`."""
    try:
        nodes, edges = (
            json.loads(value[name]) if isinstance(value[name], (str, bytes)) and value[name] else value[name]
            for name in options["feature"].split("+")
        )
        if nodes is None or len(nodes) == 0:
            return None
        nodes = np.asarray(nodes, np.float32).reshape(len(nodes), -1)
        edges = None if edges is None or len(edges) == 0 else np.asarray(edges, np.float32)
    except (TypeError, RecursionError) as error:  # JSON of another form
        raise ValueError("not the lists of numbers that a graph has") from error
    if not (np.isfinite(nodes).all() and (edges is None or np.isfinite(edges).all())):
        raise ValueError("a graph has numbers that are not finite")
    count, most = len(nodes), options["nodes"]
    if nodes.shape[1] != options["features"] or count > most:
        raise ValueError(
            f"a graph of {count} nodes with {nodes.shape[1]} features; up to {most} of {options['features']} fit"
        )
    weights = np.zeros((count, count), np.float32)
    if options["edges"] == "matrix":
        weights[:] = 0 if edges is None else edges  # a ValueError where it is none
    elif edges is not None:
        first, second = edges.astype(np.int64).T
        if (edges % 1).any() or not 0 <= min(first.min(), second.min()) <= max(first.max(), second.max()) < count:
            raise ValueError(f"an edge names what is no node, outside 0 to {count - 1}")
        weights[first, second] = weights[second, first] = 1
    result = np.zeros((most, options["features"] + most), np.float32)
    result[:count, : options["features"]] = nodes
    result[:count, options["features"] : options["features"] + count] = weights
    return result, np.arange(most) < count


def _said(value: Mapping[str, Any]) -> dict[str, str]:
    return {name: as_string(one) for name, one in value.items()}


PICTURE_OPTIONS = {
    "size": (32, 32),  # (H, W) in pixels; a picture of another size is resized
    "channels": 3,
    "mean": (0.5,),  # per channel, or one for all; of pixels in [0, 1]
    "std": (0.25,),
}
IMAGE_OPTIONS = {
    **PICTURE_OPTIONS,
    "augment": dict(image.AUGMENT),  # applied on the device, to training batches only
}
TEXT_OPTIONS = {
    "tokenizer": "word",  # or "bpe"; or a file: `tokenizer.json`, or `vocab.txt` of a published BERT
    "vocabulary_size": 5000,  # the most ids there may be, with padding and out-of-vocabulary
    "length": 32,  # tokens; longer texts are cut, shorter ones padded at the end
    "augment": {"drop": 0.0},  # chance with which a word of a training text is out of vocabulary, anew in each step
}
AUDIO_OPTIONS = {
    "rate": 8000,  # Hz; recordings of another rate are resampled
    "stored_rate": 0,  # Hz, of recordings stored as bare samples; 0: the same as `rate`
    "seconds": 1.0,  # longer recordings are cut, shorter ones padded at the end
}
VIDEO_OPTIONS = {
    "frames": 8,  # of a longer video as many, evenly spread; a shorter one is padded at the end
    **PICTURE_OPTIONS,
}
TABLE_OPTIONS = {"categorical": ()}  # those of the features joined in `feature` that hold categories, not numbers
GRAPH_OPTIONS = {
    "nodes": 16,  # the most that a graph may have
    "features": 8,  # numbers of each node
    "edges": "pairs",  # of nodes, or "matrix": their weights
}
KNOWLEDGE_OPTIONS = {
    "triples": "",  # a file of lines head TAB relation TAB tail; empty: training's words that occur together
    "entities": 500,  # without a file, the most words that are entities
    "nodes": 16,  # the most entities of a row: those that it names, then their neighbours
}

MODALITY_TYPES: dict[str, ModalityType] = {
    "image": ModalityType(IMAGE_OPTIONS, lambda o, _: ((*o["size"], o["channels"]), np.uint8, 1), _read_image),
    "text": ModalityType(
        TEXT_OPTIONS,
        lambda o, _: ((o["length"],), np.int32, o["length"]),
        _read_text,
        fit=lambda values, o: text.to_json(
            text.train_tokenizer([as_string(value) for value in values], o["tokenizer"], o["vocabulary_size"])
        ),
        load=text.from_json,
        encoder_kwargs=lambda o, fitted: {"vocabulary": text.id_count(fitted)},
    ),
    "audio": ModalityType(AUDIO_OPTIONS, _audio_shape, _read_audio, encoder_kwargs=lambda o, _: {"rate": o["rate"]}),
    "video": ModalityType(
        VIDEO_OPTIONS, lambda o, _: ((o["frames"], *o["size"], o["channels"]), np.uint8, o["frames"]), _read_video
    ),
    "table": ModalityType(
        TABLE_OPTIONS,
        _table_shape,
        _read_table,
        fit=_fit_table,
        load=json.loads,
        encoder_kwargs=lambda o, fitted: {"categories": _categories(o, fitted)},
        joined=True,
    ),
    "graph": ModalityType(GRAPH_OPTIONS, _graph_shape, _read_graph, joined=True),
    "knowledge": ModalityType(
        KNOWLEDGE_OPTIONS,
        lambda o, graph: ((o["nodes"], 2 + graph.parallel * o["nodes"]), np.int32, o["nodes"]),
        lambda value, o, graph: knowledge.read(_said(value), o, graph),
        fit=lambda values, o: knowledge.fit([_said(value) for value in values], o),
        load=knowledge.load,
        encoder_kwargs=lambda o, graph: {"entities": len(graph.entities), "relations": 2 * len(graph.relations)},
        joined=True,
    ),
}
