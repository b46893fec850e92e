"""Panels of an explanation page, one per modality: pictures with overlays, coloured words, bars and waveforms.

H W image · h w grid of tokens · K images · T time · F bands or dimensions · S audio samples · N positions
"""

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmfusion.analysis.probing.attention import DISPLAY, without_padding
from mmfusion.analysis.report.example_views import WAVE_SIZE, data_url, grid, waveform_path
from mmfusion.inference.explanations import Attribution, Explanation

SUPPORTS, OPPOSES, ATTENDED = (209, 73, 47), (22, 104, 168), (126, 78, 178)
MAX_SIDE = 384  # pixels; larger images are scaled down
MAX_CELLS = 56  # of an overlay, per axis; attributions of single pixels of larger images are averaged
MAX_BARS = 16
MAX_MAPS = 16  # words whose attention over an image is shown
CONTRAST = 0.98  # quantile of the magnitudes that is shown in full colour
WAVE_SEGMENTS = 60


class Picture(NamedTuple):
    """An image as a data URL, with an overlay; `wide` ones, such as spectrograms, fill the panel."""

    caption: str
    image: str
    overlay: str = ""
    wide: bool = False


class Word(NamedTuple):
    """A word with its share from -1 (opposes) to 1 (supports), relative to the largest, and its exact value."""

    text: str
    share: float
    value: float


class Bar(NamedTuple):
    """A labelled value, its length from -1 to 1, and its text."""

    label: str
    share: float
    text: str


class Wave(NamedTuple):
    """A waveform as an SVG path, and (left, width, share) of segments: attributions, or attention if `attended`."""

    path: str
    spans: tuple[tuple[float, float, float], ...]
    attended: bool


class Panel(NamedTuple):
    """How one modality is shown; fields that do not apply to its type are empty.

    Attributes:
      modality: its name.
      total: the sum of its attributions, as text; empty if the modality is absent.
      pictures: images with attributions and attention.
      words: words with attributions.
      attended: words with the attention that they receive.
      maps: per word, its attention over an image.
      bars: columns, dimensions or nodes with attributions.
      wave: the waveform.
      note: what the reader must know.
    """

    modality: str
    total: str = ""
    pictures: tuple[Picture, ...] = ()
    words: tuple[Word, ...] = ()
    attended: tuple[Word, ...] = ()
    maps: tuple[Picture, ...] = ()
    bars: tuple[Bar, ...] = ()
    wave: Wave | None = None
    note: str = ""

    @property
    def shows_attention(self) -> bool:
        in_wave = self.wave is not None and self.wave.attended and self.wave.spans
        return bool(self.attended or self.maps or in_wave or "attention" in [p.caption for p in self.pictures])


class Shown(NamedTuple):
    """What a panel is made of: a modality's input, mask, attributions, received attention, options and fitted state."""

    x: np.ndarray
    mask: np.ndarray
    share: np.ndarray
    attention: np.ndarray | None
    spectrogram: np.ndarray | None
    options: Mapping[str, Any]
    fitted: Any


def panel(
    explanation: Explanation, attribution: Attribution, modality: str, options: Mapping[str, Any], fitted: Any
) -> Panel:
    """Returns the panel of a modality.

    Args:
      explanation: of a row.
      attribution: of one of its tasks.
      modality: the modality's name.
      options: its options.
      fitted: its fitted state.
    """
    if modality not in explanation.inputs:
        return Panel(modality, note="absent")
    share = attribution.modalities.get(modality)
    if share is None:
        return Panel(modality, note="Its encoder has no embedding layer that attributions could be computed for.")
    shown = Shown(
        explanation.inputs[modality], explanation.masks[modality], share, received_attention(explanation, modality),
        explanation.spectrograms.get(modality), options, fitted,
    )  # fmt: skip
    made = PANELS.get(options["kind"], _other)(shown)
    maps = word_maps(explanation, modality, options, fitted) if options["kind"] == "text" else ()
    return made._replace(modality=modality, total=number(attribution.total(modality), "+"), maps=maps)


def received_attention(explanation: Explanation, modality: str) -> np.ndarray | None:
    """Returns the attention that each token of a modality receives `[N]`, the mean over other modalities' queries.

    The modality's own queries are used only if there are no others; padded queries and tokens are left out.
    """
    by_query = {}
    for (query, key), weights in explanation.attention.items():
        if key == modality and weights.any():
            rows = without_padding(weights, explanation.masks.get(query), 0)
            by_query[query] = without_padding(rows, explanation.masks.get(key), 1).mean(axis=0)
    others = [weights for query, weights in by_query.items() if query != modality]
    return np.mean(others or list(by_query.values()), axis=0) if by_query else None


def word_maps(explanation: Explanation, modality: str, options: Mapping[str, Any], fitted: Any) -> tuple[Picture, ...]:
    """Returns the attention of each of the first words over each image; empty without such attention."""
    mask = explanation.masks[modality]
    words = DISPLAY["text"](explanation.inputs[modality], mask, fitted)
    pictures = []
    for (query, key), weights in explanation.attention.items():
        x = explanation.inputs.get(key)
        if query != modality or x is None or x.ndim != 3 or len(weights) != len(mask):
            continue
        shape = grid(weights.shape[1], x.shape[:2])
        if shape and math.prod(shape) > 1:
            url = image_url(x)
            maps = zip(words[:MAX_MAPS], weights[mask], strict=False)
            pictures += [Picture(_plain(word), url, heat_url(row.reshape(shape), x.shape[:2])) for word, row in maps]
    return tuple(pictures)


def _images(shown: Shown) -> Panel:
    """Shows an image, or several."""
    frames = shown.x[None] if shown.x.ndim == 3 else shown.x[shown.mask]
    shares = shown.share[None] if shown.share.ndim == 2 else shown.share[shown.mask]
    scale = _scale(np.concatenate([_cells(share).ravel() for share in shares]))
    pictures = []
    for k, (frame, share) in enumerate(zip(frames, shares, strict=True)):
        name = f" {k}" if len(frames) > 1 else ""
        url, size = image_url(frame), frame.shape[:2]
        pictures += [Picture(f"input{name}", url), Picture(f"attribution{name}", url, signed_url(share, scale))]
        shape = grid(len(shown.attention), size) if shown.attention is not None and len(frames) == 1 else None
        if shown.attention is not None and shape and len(shown.attention) > 1:
            pictures.append(Picture("attention", url, heat_url(shown.attention.reshape(shape), size)))
    note = "" if shares[0].shape == _cells(shares[0]).shape else "Attributions are averaged over cells of pixels."
    return Panel("", pictures=tuple(pictures), note=note)


def _words(shown: Shown) -> Panel:
    strings = [_plain(word) for word in DISPLAY[shown.options["kind"]](shown.x, shown.mask, shown.fitted)]
    attended = ()
    if shown.attention is not None and len(shown.attention) == len(strings) > 1:
        attended = words(strings, shown.attention)
    return Panel("", words=words(strings, shown.share[shown.mask]), attended=attended)


def words(strings: Sequence[str], values: np.ndarray) -> tuple[Word, ...]:
    """Returns words coloured relative to the value of the largest magnitude."""
    largest = max(float(np.abs(values).max(initial=0)), 1e-12)
    return tuple(Word(text, float(x) / largest, float(x)) for text, x in zip(strings, values, strict=True))


def bars(labels: Sequence[str], values: Sequence[float], texts: Sequence[str] | None = None) -> tuple[Bar, ...]:
    """Returns bars sorted by magnitude; those beyond the sixteen largest are summed."""
    order = sorted(range(len(values)), key=lambda k: -abs(values[k]))
    kept, rest = (order, []) if len(order) <= MAX_BARS else (order[: MAX_BARS - 1], order[MAX_BARS - 1 :])
    rows = [(labels[k] + (f" = {texts[k]}" if texts else ""), float(values[k])) for k in kept]
    if rest:
        rows.append((f"{len(rest)} others", float(sum(values[k] for k in rest))))
    largest = max([abs(x) for _, x in rows] + [1e-12])
    return tuple(Bar(label, x / largest, number(x, "+")) for label, x in rows)


def _table(shown: Shown) -> Panel:
    labels, values, texts, first = [], [], [], 0
    for name, column in shown.fitted.items():
        width = 1 if "categories" in column else len(column["mean"])
        part = slice(first, first + width)
        first += width
        labels.append(name)
        values.append(float(shown.share[part].sum()))
        texts.append(_cell(column, shown.x[part]) if shown.mask[part].any() else "missing")
    return Panel("", bars=bars(labels, values, texts))


def _cell(column: Mapping[str, Any], x: np.ndarray) -> str:
    """Returns a column's value as it was in the table."""
    if "categories" in column:
        return ("unknown", *column["categories"])[int(x[0])]
    values = x.astype(np.float64) * column["std"] + column["mean"]
    if "date" in column:
        day = datetime.datetime(1970, 1, 1) + datetime.timedelta(days=float(np.clip(values[0], -719_000, 2_900_000)))
        return day.date().isoformat()
    return number(values[0], digits=5) if len(values) == 1 else f"vector of {len(values)}"


def _embedding(shown: Shown) -> Panel:
    sizes = shown.fitted["sizes"]
    if len(sizes) > 1:
        ends = np.cumsum(list(sizes.values()))[:-1]
        return Panel("", bars=bars(list(sizes), [part.sum() for part in np.split(shown.share, ends)]))
    return Panel("", bars=bars([f"dimension {k}" for k in range(len(shown.share))], shown.share.tolist()))


def _nodes(shown: Shown) -> Panel:
    values = shown.share[shown.mask].sum(axis=1).tolist()
    return Panel("", bars=bars([f"node {k}" for k in range(len(values))], values))


def _sequence(shown: Shown) -> Panel:
    values, share = shown.x[shown.mask].T, shown.share[shown.mask].T  # [F, T]
    return Panel("", pictures=(_wide(f"{len(values)} dimensions over {values.shape[1]} positions", values, share),))


def _audio(shown: Shown) -> Panel:
    seconds = shown.mask.sum() / shown.options["rate"]
    path = waveform_path(shown.x[shown.mask])
    if shown.spectrogram is None:
        parts = [part.sum() for part in np.array_split(shown.share[shown.mask], WAVE_SEGMENTS)]
        return Panel("", wave=Wave(path, _spans(np.array(parts)), False))
    real = shown.mask.mean()  # tokens and frames also cover the padding, which is not shown
    tokens = np.zeros(0) if shown.attention is None else shown.attention[: math.ceil(real * len(shown.attention))]
    frames = math.ceil(real * len(shown.spectrogram))
    values, share = shown.spectrogram[:frames].T[::-1], shown.share[:frames].T[::-1]  # [F, T], high frequencies on top
    caption = f"spectrogram, {seconds:.2f} s, up to {shown.options['rate'] / 2000:g} kHz"
    attributed = _wide("attribution", values, share)
    return Panel(
        "", pictures=(Picture(caption, attributed.image, "", True), attributed), wave=Wave(path, _spans(tokens), True)
    )


def _spans(values: np.ndarray) -> tuple[tuple[float, float, float], ...]:
    """Returns (left, width, share) of equal segments, relative to the value of the largest magnitude."""
    shares = values / max(float(np.abs(values).max(initial=0)), 1e-12)
    width = WAVE_SIZE[0] / max(len(values), 1)
    return tuple((k * width, width, share) for k, share in enumerate(shares.tolist()))


def _other(shown: Shown) -> Panel:
    return Panel("", note=f"Attributions {list(shown.share.shape)} are in the row's .npz file.")


def _wide(caption: str, values: np.ndarray, share: np.ndarray) -> Picture:
    low, high = np.quantile(values, (0.02, 0.98))
    grey = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
    return Picture(caption, data_url(Image.fromarray(grey.astype(np.uint8))), signed_url(share, _scale(share)), True)


def image_url(pixels: np.ndarray) -> str:
    """Returns pixels `[H, W, C]` in [0, 255] as a data URL: the first three channels, or the first one as grey."""
    shown = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
    image = Image.fromarray(shown[..., :3] if shown.shape[2] >= 3 else shown[..., 0])
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return data_url(image)


def signed_url(share: np.ndarray, scale: float) -> str:
    """Returns attributions `[H, W]` as a transparent overlay; `scale` is the magnitude of full colour."""
    cells = np.clip(_cells(share) / scale, -1, 1)
    rgb = np.where(cells[..., None] > 0, SUPPORTS, OPPOSES)
    return data_url(Image.fromarray(np.dstack([rgb, 245 * np.abs(cells) ** 0.8]).astype(np.uint8)))


def heat_url(weights: np.ndarray, size: tuple[int, ...]) -> str:
    """Returns attention `[h, w]` as a transparent overlay of an image of a size `(H, W)`, interpolated."""
    relative = weights / max(float(weights.max()), 1e-12)
    heat = np.dstack([np.broadcast_to(np.array(ATTENDED), (*weights.shape, 3)), 215 * relative]).astype(np.uint8)
    factor = min(1.0, 128 / max(size))
    shape = (max(1, round(size[1] * factor)), max(1, round(size[0] * factor)))
    return data_url(Image.fromarray(heat).resize(shape, Image.Resampling.BICUBIC))


def _cells(share: np.ndarray) -> np.ndarray:
    """Returns the mean over cells of attributions `[H, W]`, with at most `MAX_CELLS` of them per axis."""
    height, width = (min(MAX_CELLS, side) for side in share.shape)
    if (height, width) == share.shape:
        return share
    image = Image.fromarray(share.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _scale(values: np.ndarray) -> float:
    magnitudes = np.abs(values[values != 0])
    return max(float(np.quantile(magnitudes, CONTRAST)), 1e-12) if magnitudes.size else 1.0


def number(x: float, sign: str = "", digits: int = 3) -> str:
    """Returns a number with some significant digits; with `sign="+"` it always has a sign, and large ones commas."""
    rounded = float(f"{x:.{digits}g}")
    return f"{rounded:{sign},.0f}" if 1000 <= abs(rounded) < 1e12 else f"{rounded:{sign}.{max(digits, 4)}g}"


def _plain(word: str) -> str:
    return word.replace("Ġ", "") or "␣"  # Ġ is the space of byte-level BPE


PANELS: dict[str, Callable[[Shown], Panel]] = {
    "image": _images, "images": _images, "video": _images, "text": _words, "knowledge": _words, "table": _table,
    "embedding": _embedding, "sequence": _sequence, "graph": _nodes, "audio": _audio,
}  # fmt: skip
