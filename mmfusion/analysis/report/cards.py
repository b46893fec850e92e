"""Test examples as a page shows them: pictures, words and sounds, each with where the model looked.

H W picture · h w grid of tokens · N tokens · S audio samples
"""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmfusion.analysis.probing.attention import Shown

LARGEST = 192  # pixels of a picture's longer side, above which it is made smaller
COLUMNS = 120  # of a drawn sound
WAVE = (240, 48)  # width and height of a drawn sound, in the page's units
HOT = np.array([232, 76, 24], np.uint8)


class Part(NamedTuple):
    """One modality of an example; what does not apply to its kind is empty.

    Attributes:
      modality: its name.
      picture, heat: addresses with the data in them; the heat lies over the picture.
      words: each with its share of the attention, 1 for the most.
      wave: path of a sound.
      spans: (left, width, share) of stretches of a sound.
      weight: of a modality that is one token.
      absent: whether the example does not have it.
    """

    modality: str
    picture: str = ""
    heat: str = ""
    words: tuple[tuple[str, float], ...] = ()
    wave: str = ""
    spans: tuple[tuple[float, float, float], ...] = ()
    weight: str = ""
    absent: bool = False


class Card(NamedTuple):
    """An example: its parts, what it is and what the model says; `right` is "" of numbers."""

    id: int
    parts: tuple[Part, ...]
    target: str
    predicted: str
    right: str


def card(shown: Shown, modalities: Mapping[str, Mapping[str, Any]], classes: bool) -> Card:
    """Returns an example as a page shows it.

    Args:
      shown: the example.
      modalities: name -> options, of the run's config.
      classes: whether the target is a class, and the prediction right or wrong.
    """
    parts = tuple(
        _part(m, shown, options) if len(shown.inputs.get(m, ())) else Part(m, absent=True)
        for m, options in sorted(modalities.items())
    )
    right = ("right" if shown.target == shown.predicted else "wrong") if classes else ""
    return Card(shown.id, parts, shown.target, shown.predicted, right)


def looked_at(shown: Shown, modality: str) -> np.ndarray | None:
    """Returns the attention that each token of a modality receives `[N]`, the mean over queries; None without any.

    Queries of other modalities and learned ones count; only where there are none do the modality's own.
    """
    to = {query: weights for (query, key), weights in shown.attention.items() if key == modality and weights.size}
    others = {query: weights for query, weights in to.items() if query != modality}
    means = [np.asarray(weights, np.float64).mean(axis=0) for weights in (others or to).values()]
    return np.mean(means, axis=0) if means else None


def _part(modality: str, shown: Shown, options: Mapping[str, Any]) -> Part:
    weights, value = looked_at(shown, modality), shown.inputs[modality]
    one = weights is not None and len(weights) == 1
    part = PARTS[options["kind"]](modality, value, None if one else weights, options)
    return part._replace(weight=f"{weights[0]:.2f}") if one else part


def _picture(modality: str, pixels: np.ndarray, weights: np.ndarray | None, _: Mapping[str, Any]) -> Part:
    picture = Image.fromarray(pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0])
    picture.thumbnail((LARGEST, LARGEST))
    shape = None if weights is None else grid(len(weights), pixels.shape[:2])
    if shape is None:
        return Part(modality, picture=_address(picture))
    shares = _shares(weights).reshape(shape)  # [h, w]
    heat = np.dstack([*(np.full(shape, colour, np.uint8) for colour in HOT), np.uint8(200 * shares)])
    over = Image.fromarray(heat).resize(picture.size, Image.Resampling.BICUBIC)
    return Part(modality, picture=_address(picture), heat=_address(over))


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the rows and columns of so many tokens over a picture `(H, W)`; None where they are no such grid."""
    rows = round(math.sqrt(tokens * size[0] / size[1]))
    return (rows, tokens // rows) if rows and tokens % rows == 0 and _alike(rows, tokens // rows, size) else None


def _alike(rows: int, columns: int, size: tuple[int, int]) -> bool:
    return abs(rows / columns * size[1] / size[0] - 1) < 0.35  # strides round a grid up or down


def _words(modality: str, words: list[str], weights: np.ndarray | None, _: Mapping[str, Any]) -> Part:
    shares = _shares(weights) if weights is not None and len(weights) == len(words) else np.zeros(len(words))
    plain = [word.replace("Ġ", "") or "␣" for word in words]  # byte-level BPE's space
    return Part(modality, words=tuple(zip(plain, shares.tolist(), strict=True)))


def _sound(modality: str, samples: np.ndarray, weights: np.ndarray | None, options: Mapping[str, Any]) -> Part:
    width, height = WAVE
    columns = np.array_split(np.asarray(samples, np.float64), min(COLUMNS, len(samples)))
    loudest = max(np.abs(samples).max(), 1e-9)
    at = [(k + 0.5) * width / len(columns) for k in range(len(columns))]
    above, below = (
        [f"{x:.1f} {(0.5 - 0.48 * end(column) / loudest) * height:.1f}" for x, column in zip(at, columns, strict=True)]
        for end in (np.max, np.min)
    )
    wave = f"M{'L'.join([*above, *reversed(below)])}Z"
    if weights is None:
        return Part(modality, wave=wave)
    # Tokens cover the padding, too, which is not shown.
    real = math.ceil(len(weights) * min(1.0, len(samples) / (options["rate"] * options["seconds"])))
    shares = _shares(weights[:real])
    spans = [(k * width / real, width / real, share) for k, share in enumerate(shares.tolist())]
    return Part(modality, wave=wave, spans=tuple(spans))


def _shares(weights: np.ndarray) -> np.ndarray:
    return weights / max(weights.max(), 1e-12)


def _address(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _film(modality: str, frames: np.ndarray, weights: np.ndarray | None, options: Mapping[str, Any]) -> Part:
    """Shows the frames side by side, as one picture."""
    strip = np.concatenate(list(frames), axis=1)  # [H, T·W, C]
    return _picture(modality, strip, weights if weights is not None and len(weights) == len(frames) else None, options)


LISTED = ("table", "graph", "knowledge")  # kinds that are shown as words
PARTS = {"image": _picture, "text": _words, "audio": _sound, "video": _film} | dict.fromkeys(LISTED, _words)
