"""How a score falls as one modality's data are spoiled: seeded corruptions by kind, and the areas of their curves.

B batch · H W picture · C channels · T positions or frames · S audio samples · n real positions of one row
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
from mmfusion.errors import UserError, nearest

# All but QUALITY and SNR are what severity 1 does; a severity between does so much less, in proportion.
GAUSSIAN = 100.0  # standard deviation of the noise, in pixel levels (0 to 255)
BLUR = 0.1  # standard deviation of the kernel, in lengths of the picture's shorter side
OCCLUSION = 0.5  # share of the picture's area
GRAY = 128  # pixel level of what is occluded
QUALITY = (100, 2)  # of JPEG (1 to 100), just above severity 0 and at 1
DROP = 0.8  # chance that a token is removed
SWAP = 1.0  # chance that two neighbours are swapped, where neither is swapped already
TYPO = 0.3  # chance that a letter is edited
SNR = (40.0, -10.0)  # signal-to-noise ratio in dB, just above severity 0 and at 1
TIME_MASK = 0.8  # share of the real samples
COLUMN_NOISE = 2.0  # standard deviation of the noise on numbers of a table, in training's deviations
LOST = 0.8  # chance that a column's value, a frame or an edge is lost

# (one row's real values, severity above 0 and up to 1, generator, what training taught) -> the row's new values
Corruption = Callable[[np.ndarray, float, np.random.Generator, Any], np.ndarray]


def _gaussian(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    return pixels + severity * GAUSSIAN * random.standard_normal(pixels.shape)  # [H, W, C]


def _blur(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    sigma = severity * BLUR * min(pixels.shape[:2])
    return gaussian_filter(pixels.astype(np.float32), (sigma, sigma, 0), mode="nearest")


def _occlusion(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    # Of the picture's own proportions (a square in a square), so that every share of every picture fits.
    share = np.sqrt(severity * OCCLUSION)
    result = pixels.copy()
    result[tuple(_stretch(round(share * side), side, random) for side in pixels.shape[:2])] = GRAY
    return result


def _compression(pixels: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    # JPEG has no transparency: pictures that are not RGB are stored a channel at a time.
    planes, stored = [pixels] if pixels.shape[2] == 3 else np.moveaxis(pixels, 2, 0), []
    for plane in planes:
        file = io.BytesIO()
        Image.fromarray(plane).save(file, "JPEG", quality=round(np.interp(severity, (0, 1), QUALITY)))
        stored.append(np.asarray(Image.open(file)))
    return np.dstack(stored)  # [H, W, C]


def _stretch(length: int, whole: int, random: np.random.Generator) -> slice:
    """Returns `length` places in a row out of `whole`; of one draw, a longer stretch holds the shorter ones."""
    start = int(random.random() * (whole - length + 1))
    return slice(start, start + length)


def _drop(ids: np.ndarray, severity: float, random: np.random.Generator, _: Tokenizer | None) -> np.ndarray:
    chance = random.random(len(ids))  # [n]
    return ids[chance >= min(severity * DROP, chance.max())]  # one is left: a text of none would be an absent one


def _swap(ids: np.ndarray, severity: float, random: np.random.Generator, _: Tokenizer | None) -> np.ndarray:
    chance = random.random(len(ids) - 1)  # [n - 1], of the pair at i and i + 1
    order, moved = np.arange(len(ids)), np.zeros(len(ids), bool)
    for i in np.argsort(chance):  # not left to right: then a swap at one severity could be none at a higher one
        if chance[i] < severity * SWAP and not moved[i : i + 2].any():
            order[i : i + 2], moved[i : i + 2] = (i + 1, i), True
    return ids[order]


def _typo(ids: np.ndarray, severity: float, random: np.random.Generator, tokenizer: Tokenizer | None) -> np.ndarray:
    if tokenizer is None:
        raise ValueError("corruption 'typo' needs the tokenizer that made the ids")
    parts = []
    for word, own in _words(ids, tokenizer):
        new = _misspell(word, severity * TYPO, random)
        if new != word:  # the others keep their ids, since not every word is encoded again as it was
            row, real = text.encode(tokenizer, [new], 4 * len(new) + 1, special=False)  # at most a token a byte
            own = row[real]
        parts.append(own)
    return np.concatenate(parts)


def _words(ids: np.ndarray, tokenizer: Tokenizer) -> list[tuple[str, np.ndarray]]:
    """Returns each word as a string and as its ids; the string is empty where the word is not known."""
    tokens = cast(list[str], [tokenizer.id_to_token(int(i)) for i in ids])  # none is None: the tokenizer made the ids
    if not isinstance(tokenizer.model, models.BPE):  # a token is a word, or a piece that goes on with one
        starts = [k for k, token in enumerate(tokens) if k == 0 or not token.startswith("##")]
        spans = [slice(*ends) for ends in zip(starts, [*starts[1:], len(ids)], strict=True)]
        said = ["".join(tokens[span]).replace("##", "") for span in spans]
        known = [not (len(word) > 2 and word[0] == "[" and word[-1] == "]") for word in said]  # as [OOV] or [CLS]
        return [(word * real, ids[span]) for word, real, span in zip(said, known, spans, strict=True)]
    starts = [k for k, token in enumerate(tokens) if k == 0 or token[0] == "Ġ"]  # byte-level BPE's space
    spans = [slice(*ends) for ends in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [(decoders.ByteLevel().decode(tokens[span]).strip(), ids[span]) for span in spans]


def _misspell(word: str, chance: float, random: np.random.Generator) -> str:
    """Returns the word with letters left out, replaced, added, or swapped with the one before; never empty."""
    hit = random.random(len(word)) < chance
    which = random.integers(4, size=len(word))
    letters = random.choice(list(string.ascii_lowercase), len(word))
    result = ""
    for i, letter in enumerate(word):
        edits = result, result + letters[i], result + letter + letters[i], result[:-1] + letter + result[-1:]
        result = edits[which[i]] if hit[i] and letter.isalpha() else result + letter
    return result or word


def _noise(samples: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    noise = random.standard_normal(len(samples))  # [n]
    # By the power of this very noise, so that the ratio is exact; not clipped, which would change it.
    ratio = np.mean(np.square(samples, dtype=np.float64)) / np.mean(noise**2)
    return samples + np.sqrt(ratio / 10 ** (np.interp(severity, (0, 1), SNR) / 10)) * noise


def _time_mask(samples: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    result = samples.copy()
    result[_stretch(round(severity * TIME_MASK * len(samples)), len(samples), random)] = 0
    return result


def _freeze(frames: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    still = _stretch(round(severity * LOST * len(frames)), len(frames), random)
    result = frames.copy()
    result[still] = frames[max(still.start - 1, 0)]  # the frame before stays
    return result


def _column_noise(row: np.ndarray, severity: float, random: np.random.Generator, fitted: Any) -> np.ndarray:
    """Numbers get noise; a category becomes one that is drawn, as often as a value would be lost."""
    result, place = row.astype(np.float64), 0
    for column in fitted.values():
        if "categories" in column:
            chance, other = random.random(), random.integers(len(column["categories"]) + 1)
            if chance < severity * LOST and np.isfinite(row[place]):
                result[place] = other
            place += 1
        else:
            count = len(column["mean"])
            result[place : place + count] += severity * COLUMN_NOISE * random.standard_normal(count)
            place += count
    return result


def _lose_columns(row: np.ndarray, severity: float, random: np.random.Generator, _: Any) -> np.ndarray:
    chance = random.random(len(row))
    chance = np.where(np.isfinite(row), chance, -1)  # one that is there stays: a row of none would be an absent one
    return np.where(chance >= min(severity * LOST, chance.max()), row, np.nan)


def _lose_edges(graph: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
    nodes = len(graph)
    chance = np.triu(random.random((nodes, nodes)), 1)
    result = graph.copy()
    result[:, -nodes:] *= (chance + chance.T) >= severity * LOST  # both ways alike
    return result


def _frames(one: Corruption) -> Corruption:
    """Returns a corruption of pictures done to every frame alike, by the same draws."""

    def every(frames: np.ndarray, severity: float, random: np.random.Generator, _: None) -> np.ndarray:
        seed = int(random.integers(2**32))
        return np.stack([one(frame, severity, np.random.default_rng(seed), None) for frame in frames])

    return every


# Pictures: Hendrycks & Dietterich 2019 (arXiv:1903.12261). Typos: Belinkov & Bisk 2018 (arXiv:1711.02173).
CORRUPTIONS: dict[str, dict[str, Corruption]] = {
    "image": {"gaussian": _gaussian, "blur": _blur, "occlusion": _occlusion, "compression": _compression},
    "text": {"drop": _drop, "swap": _swap, "typo": _typo},
    "audio": {"noise": _noise, "time_mask": _time_mask},
    "video": {
        "gaussian": _gaussian,
        "blur": _frames(_blur),
        "occlusion": _frames(_occlusion),
        "compression": _frames(_compression),
        "freeze": _freeze,
    },
    "table": {"noise": _column_noise, "missing": _lose_columns},
    "graph": {"edges": _lose_edges},
    "knowledge": {"relations": _lose_edges},
}


def corrupt(batch: Batch, modality: str, kind: str, name: str, severity: float, seed: int, fitted: Any = None) -> Batch:
    """Returns the batch with one modality spoiled in every row that has it; the same batch at severity 0.

    A row's draws come from (seed, name, id): not from its neighbours, its place, or the severity, so that a row is
    spoiled more and more in one way. Every array but the modality's input and mask is the batch's own.

    Args:
      batch: NumPy arrays; nothing is written into them.
      modality: its name in the batch.
      kind: of the modality, a key of `CORRUPTIONS`.
      name: of the corruption, a key of `CORRUPTIONS[kind]`.
      severity: from 0 (none) to 1.
      seed: at least 0.
      fitted: what training taught of the modality: a text's tokenizer, which only `typo` needs, or a table's columns.

    Raises:
      UserError: the kind or the name is unknown.
      ValueError: the severity is outside 0 to 1, or `typo` has no tokenizer.
    """
    if kind not in CORRUPTIONS:
        raise UserError(f"modality kind {kind!r} has no corruptions: {nearest(kind, CORRUPTIONS)}")
    if name not in CORRUPTIONS[kind]:
        raise UserError(f"corruption {name!r} of {kind} is unknown: {nearest(name, CORRUPTIONS[kind])}")
    if not 0 <= severity <= 1:
        raise ValueError(f"a severity must be from 0 to 1, got {severity}")
    if severity == 0:
        return batch
    spoil = CORRUPTIONS[kind][name]
    inputs, masks = np.array(batch.inputs[modality]), np.array(batch.mask[modality])  # copies
    for place in np.flatnonzero(batch.present[modality] & masks.any(axis=1) & (batch.id >= 0)):
        random = np.random.default_rng([seed, zlib.crc32(name.encode()), int(batch.id[place])])
        values, mask = inputs[place], masks[place]  # views: what is written below is in the copies
        if kind == "image":
            new = spoil(values, severity, random, fitted)  # [H, W, C]
            values[:] = np.clip(np.rint(new), 0, 255)
        elif kind == "video":
            values[mask] = np.clip(np.rint(spoil(values[mask], severity, random, fitted)), 0, 255)  # [T, H, W, C]
        elif kind == "table":  # [F], what is missing anywhere
            new = spoil(np.where(mask, values, np.nan), severity, random, fitted)
            mask[:] = np.isfinite(new)
            values[:] = np.where(mask, new, 0)
        elif kind in ("graph", "knowledge"):  # [N, F + N]
            values[:] = spoil(values, severity, random, fitted)
        else:  # [T] or [S], the real ones first
            new = spoil(values[mask], severity, random, fitted)[: len(values)]
            values[: len(new)], values[len(new) :] = new, text.PAD  # which is 0, as audio is padded
            mask[:] = np.arange(len(mask)) < len(new)
    return batch.replace(inputs={**batch.inputs, modality: inputs}, mask={**batch.mask, modality: masks})


def relative_robustness(severities: Sequence[float], scores: Sequence[float]) -> float:
    """Returns the area under a robustness curve by the trapezoid rule (Liang et al. 2021, arXiv:2107.07502).

    Args:
      severities: increasing from 0 to 1, at least two.
      scores: one a severity.

    Raises:
      ValueError: the severities are not that, or the scores are not as many.
    """
    x, y = _curves(severities, scores)
    return float(np.trapezoid(y, x))


def effective_robustness(severities: Sequence[float], scores: Sequence[float], reference: Sequence[float]) -> float:
    """Returns the area of a curve above late fusion's, shifted to start equal (Taori et al. 2020, arXiv:2007.00644).

    Args:
      severities: increasing from 0 to 1, at least two.
      scores: one a severity.
      reference: late fusion's scores; where they fall more slowly, the area is negative.

    Raises:
      ValueError: the severities are not that, or the scores are not as many.
    """
    x, y, late = _curves(severities, scores, reference)
    return float(np.trapezoid((y - y[0]) - (late - late[0]), x))


def _curves(severities: Sequence[float], *scores: Sequence[float]) -> list[np.ndarray]:
    x, *curves = (np.asarray(values, np.float64) for values in (severities, *scores))
    if len(x) < 2 or x[0] != 0 or x[-1] != 1 or not (np.diff(x) > 0).all():
        raise ValueError(f"severities must increase from 0 to 1, at least two, got {x.tolist()}")
    if any(len(curve) != len(x) for curve in curves):
        raise ValueError(
            f"scores must be one for each of the {len(x)} severities, got {[len(curve) for curve in curves]}"
        )
    return [x, *curves]
