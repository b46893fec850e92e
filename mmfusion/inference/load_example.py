"""Runs a model exported by mmfusion, without mmfusion: NumPy, JAX and safetensors; Pillow, soundfile or tokenizers.

`pip install jax flatbuffers numpy safetensors pillow soundfile scipy tokenizers`, and then

    python load_example.py '{"image": "shapes.png", "text": "the red circle is left of the blue square"}'

A row maps a modality, or each of its features, to its value: an image as a path, bytes or uint8 pixels `[h, w, c]`; a
text as a string; audio as a path, bytes or samples `[S]`; columns of a table as numbers, categories, vectors or dates.
A modality of any type may be given decoded, as a pair of arrays: its input and its mask, with the shapes that
`preprocessing.json` has. A modality without a value is absent.

B batch · N positions · C classes
"""

import datetime
import io
import json
import math
import os
import pathlib
import sys
from typing import Any

import numpy as np
from jax import export
from safetensors.numpy import load_file

DAY = 86_400.0  # seconds
MAX_AMPLITUDE = 1000.0  # floats beyond it are no waveform
PERIODS = ((365.2425 * DAY, 0), (7 * DAY, 4 * DAY), (DAY, 0))  # year, week, day, each with its start after 1970-01-01


class Model:
    """An exported model: `Model(folder)(rows)` returns per task its labels and probabilities, or its values."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self.spec = json.loads((self.folder / "preprocessing.json").read_text(encoding="utf-8"))
        self.weights = load_file(self.folder / "weights.safetensors")
        self.program = export.deserialize(bytearray((self.folder / "model.stablehlo").read_bytes()))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Returns the predictions of rows; raises ValueError for a row that cannot be read."""
        found: Any = self.program.call(self.weights, *self.preprocess(rows))
        result = {}
        for task, section in self.spec["tasks"].items():
            outputs = {name: np.asarray(x) for name, x in found[task].items()}
            for name, x in outputs.items():
                bad = np.flatnonzero(~np.isfinite(x).all(axis=tuple(range(1, x.ndim))))
                if len(bad):
                    raise ValueError(f"row {bad[0]}, {task}: the model's {name} are not finite")
            if section["kind"] == "regression":
                result[task] = {"values": outputs["value"]}
                continue
            names, logits = section["classes"], outputs["logits"]
            if section["kind"] == "classification":
                labels = [names[i] for i in logits.argmax(axis=1)]
            else:
                labels = [tuple(name for name, x in zip(names, row, strict=True) if x >= 0) for row in logits]
            result[task] = {"labels": labels, "probabilities": outputs["probabilities"]}
        return result

    def preprocess(self, rows: list[dict[str, Any]]) -> tuple[dict, dict, dict]:
        """Returns the program's arguments: inputs `[B, ...]`, masks `[B, N]` and presence `[B]` of each modality."""
        inputs, masks, present = {}, {}, {}
        for name, section in self.spec["modalities"].items():
            inputs[name] = np.zeros((len(rows), *section["shape"]), section["dtype"])
            masks[name] = np.zeros((len(rows), section["positions"]), bool)
            present[name] = np.zeros(len(rows), bool)
            for i, row in enumerate(rows):
                try:
                    decoded = self.decode(name, section, row)
                except (ValueError, OSError) as error:
                    raise ValueError(f"row {i}, {name}: {error}") from error
                if decoded is not None:
                    inputs[name][i], masks[name][i] = decoded
                    present[name][i] = True
        for i in range(len(rows)):
            if not any(here[i] for here in present.values()):
                raise ValueError(f"row {i}: every modality is absent")
        return inputs, masks, present

    def decode(self, name: str, section: dict[str, Any], row: dict[str, Any]) -> tuple[Any, Any] | None:
        """Returns the input of a modality and its mask `[N]`; None where it is absent."""
        given = row.get(name)
        if isinstance(given, tuple):
            return given
        shape = f"({section['dtype']}{section['shape']}, bool[{section['positions']}])"
        if section["type"] not in DECODERS:
            raise ValueError(f"this example reads no {section['type']}: give the arrays (input, mask) {shape}")
        features = section["features"]
        if section["type"] == "table":
            values = given if isinstance(given, dict) else row
            return table({**{f: given for f in features if len(features) == 1}, **values}, section)
        value = row.get(features[0]) if given is None else given
        if value is None or len(value) == 0:
            return None
        if section["type"] == "image" and section["dtype"] != "uint8":
            raise ValueError(f"this example reads images of 8 bits only: give the arrays (input, mask) {shape}")
        if section["type"] == "text":
            return text(value, section, self.folder / section["tokenizer"])
        return DECODERS[section["type"]](value, section)


def image(value: Any, section: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels `[H, W, C]` uint8 of a path, bytes or pixels, upright and resized; normalised in the model."""
    from PIL import Image, ImageOps

    height, width, channels = section["shape"]
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise ValueError(f"pixels are {value.dtype}{list(value.shape)}, not uint8 [h, w] or [h, w, c]")
        opened = Image.fromarray(value[:, :, 0] if value.ndim == 3 and value.shape[2] == 1 else value)
    else:
        opened = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        opened = ImageOps.exif_transpose(opened)
    if opened.mode.startswith("I") or opened.mode == "F":
        raise ValueError(f"this example reads images of 8 bits only: give pixels {section['shape']} uint8")
    if opened.mode == "P":
        opened = opened.convert("RGBA" if "transparency" in opened.info else "RGB")
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    opened = opened if opened.mode == mode else opened.convert(mode)
    if opened.size != (width, height):
        opened = opened.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(opened).reshape(height, width, channels), np.ones(1, bool)


def text(value: Any, section: dict[str, Any], path: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the token ids `[T]` of a string, truncated or padded with 0, and their mask."""
    from tokenizers import Tokenizer

    (length,) = section["shape"]
    tokenizer = Tokenizer.from_file(str(path))
    stripped = value.strip()
    special = tokenizer.post_processor is not None
    encoding = tokenizer.encode(stripped, add_special_tokens=special)
    ids = encoding.ids[:length] if stripped else []
    if ids and special and length < len(encoding.ids) and encoding.special_tokens_mask[-1]:
        ids[-1] = encoding.ids[-1]  # a truncated text keeps its end token
    return (np.array(ids + [0] * (length - len(ids)), np.int32), np.arange(length) < len(ids)) if ids else None


def audio(value: Any, section: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns samples `[S]` float32 at the model's rate, mixed to mono, and their mask; files are not checked."""
    rate = section["options"]["rate"]
    if isinstance(value, (str, os.PathLike, bytes)):
        import soundfile

        try:
            waveform, source = soundfile.read(io.BytesIO(value) if isinstance(value, bytes) else value, dtype="float32")
        except soundfile.SoundFileError as error:
            raise ValueError(f"not a recording: {error}") from error
        waveform = waveform.mean(axis=1) if waveform.ndim == 2 else waveform
    else:
        waveform, source = np.asarray(value), section["options"]["stored_rate"] or rate
        if waveform.ndim != 1:
            raise ValueError(f"samples are {list(waveform.shape)}, not [S]")
        waveform = waveform.astype(np.float32) / (1 if waveform.dtype.kind == "f" else 2**15)
    if len(waveform) and not np.abs(waveform).max() <= MAX_AMPLITUDE:  # also where one is NaN
        raise ValueError("samples are not finite, or far outside [-1, 1]")
    if source != rate and len(waveform):
        from scipy.signal import resample_poly

        common = math.gcd(source, rate)
        waveform = resample_poly(waveform, rate // common, source // common)
    (samples,) = section["shape"]
    padded = np.zeros(samples, np.float32)
    padded[: len(waveform[:samples])] = waveform[:samples]
    return (padded, np.arange(samples) < len(waveform)) if len(waveform) else None


def table(values: dict[str, Any], section: dict[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the columns `[F]` float32, standardised or as the number of a category, 0 if unknown, and their mask."""
    columns = []
    for name, column in section["fitted"].items():
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and name in section["class_names"]:
            value = section["class_names"][name][value]
        if "categories" in column:
            category = canonical(value)
            index = column["categories"].index(category) + 1 if category in column["categories"] else 0
            columns.append(np.array([index if category else np.nan]))
            continue
        found = date(value) if "date" in column else numbers(value)
        width = len(column["mean"])
        if found.size == 1 and np.isnan(found[0]):
            found = np.full(width, np.nan)
        if found.size != width:
            raise ValueError(f"column {name!r} has {found.size} values, not {width}")
        columns.append((found - column["mean"]) / column["std"])
    row = np.concatenate(columns).astype(np.float32)
    mask = np.isfinite(row)
    return (np.where(mask, row, 0), mask) if mask.any() else None


def numbers(value: Any) -> np.ndarray:
    """Returns a number, or the elements of a vector, as float64 `[n]`, NaN for a missing value."""
    if isinstance(value, str) and value.strip().startswith("["):
        value = json.loads(value)
    items = list(value) if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value) else [value]
    missing = [item is None or (isinstance(item, str) and not item.strip()) for item in items]
    found = np.array([np.nan if none else float(x) for none, x in zip(missing, items, strict=True)])
    if np.isinf(found).any():
        raise ValueError(f"numbers must be finite, got {value}")
    return found if found.size else np.array([np.nan])


def date(value: Any) -> np.ndarray:
    """Returns days since 1970, and sine and cosine of the phase in year, week and day `[7]`, of ISO 8601 or seconds."""
    try:
        seconds = float(numbers(value)[0])
    except ValueError:
        parsed = datetime.datetime.fromisoformat(str(value).strip())
        seconds = (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).timestamp()
    phases = [2 * np.pi * ((seconds - start) % period) / period for period, start in PERIODS]
    return np.array([seconds / DAY, *(f(phase) for phase in phases for f in (np.sin, np.cos))])


def canonical(value: Any) -> str:
    """Returns the canonical form of a category: `3` for 3, 3.0 and "3.0", `true` for True; "" if missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    category = str(value).strip()
    if category.lower() in ("true", "false"):
        return category.lower()
    try:
        number = float(category)
    except ValueError:
        return category
    is_integer = number.is_integer() and abs(number) < 2**53 and category.lstrip("+-")[:1].isdigit()
    leading_zero = len(category) > 1 and category[0] == "0" and category[1].isdigit()
    return str(int(number)) if is_integer and not leading_zero else category


DECODERS: dict[str, Any] = {"image": image, "text": text, "audio": audio, "table": table}


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    predictions = Model(pathlib.Path(__file__).parent)([json.loads(row) for row in sys.argv[1:]])
    print(json.dumps(predictions, default=lambda x: x.tolist(), indent=2))
