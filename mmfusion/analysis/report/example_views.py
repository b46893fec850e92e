"""Test examples of an HTML report: images, text and waveforms with the attention that their tokens receive.

H W image · h w grid of tokens · N tokens · T frames · S audio samples
"""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmfusion.analysis.probing.attention import ExampleView

MAX_SIDE = 192  # pixels; larger images are scaled down
WAVE_COLUMNS = 120
WAVE_SIZE = (240, 48)  # width and height in the page's units
HEAT_COLOUR = np.array([232, 76, 24], np.uint8)
GRID_TOLERANCE = 0.35  # relative deviation of a cell's aspect ratio, as strides round the grid up or down


class ModalityView(NamedTuple):
    """One modality of an example; fields that do not apply to its type are empty.

    Attributes:
      modality: the modality's name.
      image: the image as a data URL.
      heat: attention over the image as a data URL.
      words: (string, attention relative to the largest) of each token.
      wave: SVG path of the waveform.
      spans: (left, width, relative attention) of segments of the waveform.
      weight: attention of a modality with a single token.
      absent: whether the modality is absent from the example.
    """

    modality: str
    image: str = ""
    heat: str = ""
    words: tuple[tuple[str, float], ...] = ()
    wave: str = ""
    spans: tuple[tuple[float, float, float], ...] = ()
    weight: str = ""
    absent: bool = False


class ExampleCard(NamedTuple):
    """An example with its target and prediction; `right` is `right`, `wrong`, or "" for regression."""

    id: int
    modalities: tuple[ModalityView, ...]
    target: str
    predicted: str
    right: str


def example_card(view: ExampleView, modalities: Mapping[str, Mapping[str, Any]], classes: bool) -> ExampleCard:
    """Returns an example for the HTML page.

    Args:
      view: the example.
      modalities: name -> options, from the run's config.
      classes: whether the target is a class, so that the prediction is right or wrong.
    """
    shown = tuple(
        _modality_view(m, view, options) if len(view.inputs.get(m, ())) else ModalityView(m, absent=True)
        for m, options in sorted(modalities.items())
    )
    right = ("right" if view.target == view.predicted else "wrong") if classes else ""
    return ExampleCard(view.id, shown, view.target, view.predicted, right)


def received_attention(view: ExampleView, modality: str) -> np.ndarray | None:
    """Returns the attention that each token of a modality receives `[N]`, averaged over queries; None if there is none.

    Queries are those of other modalities and learned ones; the modality's own queries are used only if there are none.
    """
    by_query = {query: weights for (query, key), weights in view.attention.items() if key == modality and weights.size}
    others = {query: weights for query, weights in by_query.items() if query != modality}
    means = [np.asarray(weights, np.float64).mean(axis=0) for weights in (others or by_query).values()]
    return np.mean(means, axis=0) if means else None


def _modality_view(modality: str, view: ExampleView, options: Mapping[str, Any]) -> ModalityView:
    weights, value = received_attention(view, modality), view.inputs[modality]
    if weights is not None and len(weights) == 1:
        return RENDERERS[options["kind"]](modality, value, None, options)._replace(weight=f"{weights[0]:.2f}")
    return RENDERERS[options["kind"]](modality, value, weights, options)


def _image(modality: str, pixels: np.ndarray, weights: np.ndarray | None, _: Mapping[str, Any]) -> ModalityView:
    image = Image.fromarray(pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0])
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    shape = None if weights is None else grid(len(weights), (pixels.shape[0], pixels.shape[1]))
    if weights is None or shape is None:
        return ModalityView(modality, image=data_url(image))
    attention = _relative(weights).reshape(shape)  # [h, w]
    heat = np.dstack([*(np.full(shape, colour, np.uint8) for colour in HEAT_COLOUR), np.uint8(200 * attention)])
    overlay = Image.fromarray(heat).resize(image.size, Image.Resampling.BICUBIC)
    return ModalityView(modality, image=data_url(image), heat=data_url(overlay))


def grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the rows and columns of a grid of tokens over an image `(H, W)`; None if the tokens form no grid."""
    rows = round(math.sqrt(tokens * size[0] / size[1]))
    if not rows or tokens % rows:
        return None
    columns = tokens // rows
    return (rows, columns) if abs(rows / columns * size[1] / size[0] - 1) < GRID_TOLERANCE else None


def _words(modality: str, words: list[str], weights: np.ndarray | None, _: Mapping[str, Any]) -> ModalityView:
    attention = _relative(weights) if weights is not None and len(weights) == len(words) else np.zeros(len(words))
    plain = [word.replace("Ġ", "") or "␣" for word in words]  # Ġ is the space of byte-level BPE
    return ModalityView(modality, words=tuple(zip(plain, attention.tolist(), strict=True)))


def _waveform(
    modality: str, samples: np.ndarray, weights: np.ndarray | None, options: Mapping[str, Any]
) -> ModalityView:
    width, wave = WAVE_SIZE[0], waveform_path(samples)
    if weights is None:
        return ModalityView(modality, wave=wave)
    # Tokens also cover the padding, which is not plotted.
    real = math.ceil(len(weights) * min(1.0, len(samples) / (options["rate"] * options["seconds"])))
    attention = _relative(weights[:real])
    spans = [(k * width / real, width / real, share) for k, share in enumerate(attention.tolist())]
    return ModalityView(modality, wave=wave, spans=tuple(spans))


def waveform_path(samples: np.ndarray) -> str:
    """Returns the SVG path of a waveform `[S]`, in a box of `WAVE_SIZE`."""
    width, height = WAVE_SIZE
    columns = np.array_split(np.asarray(samples, np.float64), min(WAVE_COLUMNS, len(samples)))
    peak = max(np.abs(samples).max(), 1e-9)
    centres = [(k + 0.5) * width / len(columns) for k in range(len(columns))]
    above, below = (
        [
            f"{x:.1f} {(0.5 - 0.48 * end(column) / peak) * height:.1f}"
            for x, column in zip(centres, columns, strict=True)
        ]
        for end in (np.max, np.min)
    )
    return f"M{'L'.join([*above, *reversed(below)])}Z"


def _video(modality: str, frames: np.ndarray, weights: np.ndarray | None, options: Mapping[str, Any]) -> ModalityView:
    """Renders the frames side by side as one image."""
    strip = np.concatenate(list(frames), axis=1)  # [H, T·W, C]
    return _image(modality, strip, weights if weights is not None and len(weights) == len(frames) else None, options)


def _relative(weights: np.ndarray) -> np.ndarray:
    return weights / max(weights.max(), 1e-12)


def data_url(image: Image.Image) -> str:
    """Returns an image as the URL of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


RENDERERS = {
    "image": _image, "text": _words, "audio": _waveform, "video": _video,
    "table": _words, "graph": _words, "knowledge": _words, "embedding": _words, "sequence": _words, "images": _video,
}  # fmt: skip
