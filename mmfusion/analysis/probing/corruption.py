"""Seeded corruptions of one modality by modality type, and robustness measures of the resulting scores.

B batch · H W image · C channels · T positions or frames · S audio samples · n unmasked positions of one row
"""

import io
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from tokenizers import Tokenizer, decoders, models

from mmfusion.data import text
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError

# Strengths at severity 1, which scale linearly with the severity; QUALITY and SNR are interpolated.
GAUSSIAN = 100.0  # standard deviation of the noise, in pixel levels (0 to 255)
BLUR = 0.1  # standard deviation of the kernel, relative to the image's shorter side
OCCLUSION = 0.5  # share of the image's area
GRAY = 128  # pixel level of the occluded area
QUALITY = (100, 2)  # of JPEG (1 to 100), in the limit of severity 0 and at 1
DROP = 0.8  # probability that a token is removed
SWAP = 1.0  # probability that two adjacent tokens are swapped, unless one of them already is
TYPO = 0.3  # probability that a letter is edited
SNR = (40.0, -10.0)  # signal-to-noise ratio in dB, in the limit of severity 0 and at 1
TIME_MASK = 0.8  # share of the unmasked samples
COLUMN_NOISE = 2.0  # standard deviation of the noise on standardised table columns
LOST = 0.8  # probability that a table value or an edge is removed, and share of frames that are frozen

# (unmasked values of one row, severity in (0, 1], generator, fitted state of the modality) -> the row's new values
Corruption = Callable[[np.ndarray, float, np.random.Generator, Any], np.ndarray]


def _gaussian(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    return pixels + severity * GAUSSIAN * random.standard_normal(pixels.shape)  # [H, W, C]


def _blur(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    sigma = severity * BLUR * min(pixels.shape[:2])
    return gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0), mode="nearest")


def _occlusion(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    # A rectangle with the image's aspect ratio fits at any share of the area.
    share = np.sqrt(severity * OCCLUSION)
    result = pixels.copy()
    result[tuple(_interval(round(share * side), side, random) for side in pixels.shape[:2])] = GRAY
    return result


def _compression(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    # JPEG supports one or three channels only, so other images are compressed channel by channel.
    planes, stored = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0), []
    for plane in planes:
        file = io.BytesIO()
        Image.fromarray(np.rint(plane).astype(np.uint8)).save(
            file, "JPEG", quality=round(np.interp(severity, (0, 1), QUALITY))
        )
        stored.append(np.asarray(Image.open(file)))
    return np.dstack(stored)  # [H, W, C]


def _interval(length: int, total: int, random: np.random.Generator) -> slice:
    """Returns a random interval of `length` positions out of `total`; with one seed, intervals of all lengths nest."""
    start = int(random.random() * (total - length + 1))
    return slice(start, start + length)


def _drop(ids: np.ndarray, severity: float, random: np.random.Generator, _: Tokenizer | None) -> np.ndarray:
    chance = random.random(len(ids))  # [n]
    return ids[chance >= min(severity * DROP, chance.max())]  # keeps one token, as an empty text would be absent


def _swap(ids: np.ndarray, severity: float, random: np.random.Generator, _: Tokenizer | None) -> np.ndarray:
    chance = random.random(len(ids) - 1)  # [n - 1], for the pair (i, i + 1)
    order, moved = np.arange(len(ids)), np.zeros(len(ids), bool)
    for i in np.argsort(chance):  # in this order, swaps at one severity remain swaps at higher ones
        if chance[i] < severity * SWAP and not moved[i : i + 2].any():
            order[i : i + 2], moved[i : i + 2] = (i + 1, i), True
    return ids[order]


def _typo(ids: np.ndarray, severity: float, random: np.random.Generator, tokenizer: Tokenizer | None) -> np.ndarray:
    if tokenizer is None:
        raise ValueError("corruption 'typo' needs the tokenizer that made the ids")
    parts = []
    for word, word_ids in _words(ids, tokenizer):
        new = _misspell(word, severity * TYPO, random)
        if new != word:  # unchanged words keep their ids, as encoding may not reproduce them
            row, real = text.encode(tokenizer, [new], 4 * len(new) + 1, special=False)  # at most one token per byte
            word_ids = row[real]
        parts.append(word_ids)
    return np.concatenate(parts)


def _words(ids: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, np.ndarray]]:
    """Returns each word as a string and as its ids; the string is empty for a special or unknown token."""
    tokens = cast(list[str], [tokenizer.id_to_token(int(i)) for i in ids])  # never None, as the tokenizer made the ids
    if not isinstance(tokenizer.model, models.BPE):  # word-level or WordPiece, whose continuations start with ##
        starts = [k for k, token in enumerate(tokens) if k == 0 or not token.startswith("##")]
        spans = [slice(*ends) for ends in zip(starts, [*starts[1:], len(ids)], strict=True)]
        words = ["".join(tokens[span]).replace("##", "") for span in spans]
        known = [not (len(word) > 2 and word[0] == "[" and word[-1] == "]") for word in words]  # not [OOV] or [CLS]
        return [(word * real, ids[span]) for word, real, span in zip(words, known, spans, strict=True)]
    starts = [k for k, token in enumerate(tokens) if k == 0 or token[0] == "Ġ"]  # the space of byte-level BPE
    spans = [slice(*ends) for ends in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [(decoders.ByteLevel().decode(tokens[span]).strip(), ids[span]) for span in spans]


def _misspell(word: str, chance: float, random: np.random.Generator) -> str:
    """Returns the word with letters deleted, replaced, inserted or swapped with the previous one; never empty."""
    edited = random.random(len(word)) < chance
    which = random.integers(4, size=len(word))
    letters = random.choice(list(string.ascii_lowercase), len(word))
    result = ""
    for i, letter in enumerate(word):
        edits = result, result + letters[i], result + letter + letters[i], result[:-1] + letter + result[-1:]
        result = edits[which[i]] if edited[i] and letter.isalpha() else result + letter
    return result or word


def _noise(samples: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    noise = random.standard_normal(len(samples))  # [n]
    # Scaled by the power of this sample of noise, so that the ratio is exact; clipping would change it.
    ratio = np.mean(np.square(samples, dtype=np.float64)) / np.mean(noise**2)
    return samples + np.sqrt(ratio / 10 ** (np.interp(severity, (0, 1), SNR) / 10)) * noise


def _time_mask(samples: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    result = samples.copy()
    result[_interval(round(severity * TIME_MASK * len(samples)), len(samples), random)] = 0
    return result


def _freeze(frames: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    frozen = _interval(round(severity * LOST * len(frames)), len(frames), random)
    result = frames.copy()
    result[frozen] = frames[max(frozen.start - 1, 0)]  # repeats the previous frame
    return result


def _column_noise(row: np.ndarray, severity: float, random: np.random.Generator, fitted: Any) -> np.ndarray:
    """Adds Gaussian noise to numbers; replaces categories by random ones at the rate of `_lose_columns`."""
    result, position = row.astype(np.float64), 0
    for column in fitted.values():
        if "categories" in column:
            chance, other = random.random(), random.integers(len(column["categories"]) + 1)
            if chance < severity * LOST and np.isfinite(row[position]):
                result[position] = other
            position += 1
        else:
            count = len(column["mean"])
            result[position : position + count] += severity * COLUMN_NOISE * random.standard_normal(count)
            position += count
    return result


def _vector_noise(values: np.ndarray, severity: float, random: np.random.Generator, _: Any) -> np.ndarray:
    """Adds Gaussian noise to vectors `[..., D]`, relative to their root mean square."""
    scale = np.sqrt(np.mean(np.square(values, dtype=np.float64)))
    return values + severity * COLUMN_NOISE * scale * random.standard_normal(values.shape)


def _lose_columns(row: np.ndarray, severity: float, random: np.random.Generator, _: Any) -> np.ndarray:
    chance = random.random(len(row))
    chance = np.where(np.isfinite(row), chance, -1)  # keeps one value, as an empty row would be absent
    return np.where(chance >= min(severity * LOST, chance.max()), row, np.nan)


def _lose_edges(graph: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    nodes = len(graph)
    chance = np.triu(random.random((nodes, nodes)), 1)
    result = graph.copy()
    result[:, -nodes:] *= (chance + chance.T) >= severity * LOST  # symmetric, as an edge has two entries
    return result


def _per_frame(corruption: Corruption) -> Corruption:
    """Returns a corruption of images applied to every frame with the same random numbers."""

    def corrupt_frames(frames: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
        seed = int(random.integers(2**32))
        return np.stack([corruption(frame, severity, np.random.default_rng(seed), None) for frame in frames])

    return corrupt_frames


# Images: Hendrycks & Dietterich 2019 (arXiv:1903.12261). Typos: Belinkov & Bisk 2018 (arXiv:1711.02173).
CORRUPTIONS: dict[str, dict[str, Corruption]] = {
    "image": {"gaussian": _gaussian, "blur": _blur, "occlusion": _occlusion, "compression": _compression},
    "text": {"drop": _drop, "swap": _swap, "typo": _typo},
    "audio": {"noise": _noise, "time_mask": _time_mask},
    "video": {
        "gaussian": _gaussian,
        "blur": _per_frame(_blur),
        "occlusion": _per_frame(_occlusion),
        "compression": _per_frame(_compression),
        "freeze": _freeze,
    },
    "images": {
        "gaussian": _gaussian,
        "blur": _per_frame(_blur),
        "occlusion": _per_frame(_occlusion),
        "compression": _per_frame(_compression),
    },
    "embedding": {"noise": _vector_noise},
    "sequence": {"noise": _vector_noise},
    "table": {"noise": _column_noise, "missing": _lose_columns},
    "graph": {"edges": _lose_edges},
    "knowledge": {"relations": _lose_edges},
}


def corrupt(batch: Batch, modality: str, kind: str, name: str, severity: float, seed: int, fitted: Any = None) -> Batch:
    """Returns the batch with one modality corrupted in every row that has it; the same batch at severity 0.

    A row's random numbers depend on (seed, name, id) only, not on the rest of the batch, its position or the severity,
    so that the corruptions of a row are nested over severities. All other arrays are those of the batch.

    Args:
      batch: NumPy arrays; they are not modified.
      modality: its name in the batch.
      kind: the modality's type, a key of `CORRUPTIONS`.
      name: the corruption, a key of `CORRUPTIONS[kind]`.
      severity: from 0 (none) to 1.
      seed: at least 0.
      fitted: state fitted on train: the tokenizer of a text, which only `typo` needs, or the columns of a table.

    Raises:
      UserError: the modality type or the corruption is unknown.
      ValueError: the severity is not in [0, 1], or `typo` has no tokenizer.
    """
    if kind not in CORRUPTIONS:
        raise UserError("the modality type has no corruptions", path="kind", value=kind, choices=CORRUPTIONS)
    if name not in CORRUPTIONS[kind]:
        raise UserError(f"no such corruption of {kind}", path="corruption", value=name, choices=CORRUPTIONS[kind])
    if not 0 <= severity <= 1:
        raise ValueError(f"a severity must be from 0 to 1, got {severity}")
    if severity == 0:
        return batch
    corruption = CORRUPTIONS[kind][name]
    inputs, masks = np.array(batch.inputs[modality]), np.array(batch.mask[modality])  # copies
    for i in np.flatnonzero(batch.present[modality] & masks.any(axis=1) & (batch.id >= 0)):
        random = np.random.default_rng([seed, zlib.crc32(name.encode()), int(batch.id[i])])
        values, mask = inputs[i], masks[i]  # views of the copies
        if kind == "image":
            new = np.clip(corruption(values, severity, random, fitted), 0, 255)  # [H, W, C]
            values[:] = np.rint(new) if values.dtype == np.uint8 else new
        elif kind in ("video", "images"):
            values[mask] = np.clip(np.rint(corruption(values[mask], severity, random, fitted)), 0, 255)  # [T, H, W, C]
        elif kind == "table":  # [F]; any column may be missing
            new = corruption(np.where(mask, values, np.nan), severity, random, fitted)
            mask[:] = np.isfinite(new)
            values[:] = np.where(mask, new, 0)
        elif kind == "sequence":
            values[mask] = corruption(values[mask], severity, random, fitted)  # [T, D]
        elif kind in ("graph", "knowledge", "embedding"):  # [N, F + N], or [D]
            values[:] = corruption(values, severity, random, fitted)
        else:  # [T] or [S], padded at the end
            new = corruption(values[mask], severity, random, fitted)[: len(values)]
            values[: len(new)], values[len(new) :] = new, text.PAD  # PAD is 0, the padding of audio, too
            mask[:] = np.arange(len(mask)) < len(new)
    return batch.replace(inputs={**batch.inputs, modality: inputs}, mask={**batch.mask, modality: masks})


def relative_robustness(severities: Sequence[float], scores: Sequence[float]) -> float:
    """Returns the area under a robustness curve by the trapezoid rule (Liang et al. 2021, arXiv:2107.07502).

    Args:
      severities: at least two values increasing from 0 to 1.
      scores: one score per severity.

    Raises:
      ValueError: the severities do not increase from 0 to 1, or the lengths differ.
    """
    x, y = _check_curves(severities, scores)
    return float(np.trapezoid(y, x))


def effective_robustness(severities: Sequence[float], scores: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the area between a curve and late fusion's, both shifted to start at 0 (Taori et al. 2020).

    arXiv:2007.00644.

    Args:
      severities: at least two values increasing from 0 to 1.
      scores: one score per severity.
      reference: late fusion's scores; the area is negative if they decrease more slowly.

    Raises:
      ValueError: the severities do not increase from 0 to 1, or the lengths differ.
    """
    x, y, late = _check_curves(severities, scores, reference)
    return float(np.trapezoid((y - y[0]) - (late - late[0]), x))


def _check_curves(severities: Sequence[float], *scores: Sequence[float]) -> list[np.ndarray]:
    x, *curves = (np.asarray(values, np.float64) for values in (severities, *scores))
    if len(x) < 2 or x[0] != 0 or x[-1] != 1 or not (np.diff(x) > 0).all():
        raise ValueError(f"severities must increase from 0 to 1, at least two, got {x.tolist()}")
    if any(len(curve) != len(x) for curve in curves):
        raise ValueError(
            f"there must be one score for each of the {len(x)} severities, got {[len(curve) for curve in curves]}"
        )
    return [x, *curves]
