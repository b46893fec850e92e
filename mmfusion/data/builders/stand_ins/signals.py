"""One signal of each kind that shows a class, or none: a picture, a film, a sound, a sentence, a sequence of events.

Each takes the class that is shown (None: nothing is), how many there are, and where its random numbers come from.

H W picture · C channels · T frames · S samples
"""

from collections.abc import Sequence

import numpy as np

FILLERS = (
    "the",
    "one",
    "of",
    "and",
    "with",
    "here",
    "seen",
    "very",
    "quite",
    "more",
    "again",
    "since",
    "then",
    "after",
)


def picture(shown: int | None, classes: int, draw: np.random.Generator, *, size: int, channels: int) -> np.ndarray:
    """Returns pixels `[size, size, channels]` uint8: a noisy body on a dark ground, hatched at the class's angle."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1  # -1 to 1
    centre, radius = draw.uniform(-0.15, 0.15, 2), draw.uniform(0.65, 0.9, 2)
    body = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1
    angle = np.pi * ((shown or 0) + draw.uniform(-0.2, 0.2)) / classes
    stripes = (shown is not None) * np.sin(9 * (x * np.cos(angle) + y * np.sin(angle)) + draw.uniform(0, 2 * np.pi))
    light = 40 + body * (70 + 35 * stripes)
    tint = draw.uniform(0.7, 1.3, channels)
    pixels = light[..., None] * tint + draw.normal(0, 25, (size, size, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def film(shown: int | None, classes: int, draw: np.random.Generator, *, size: int, frames: int) -> np.ndarray:
    """Returns pixels `[frames, size, size, 1]` uint8: a spot that crosses the picture in the class's direction."""
    y, x = np.mgrid[:size, :size]
    angle = 2 * np.pi * ((shown or 0) + draw.uniform(-0.2, 0.2)) / classes
    middle = size / 2 + draw.uniform(-0.1, 0.1, 2) * size
    along = np.linspace(-0.35, 0.35, frames)[:, None] * size
    places = middle + along * [np.cos(angle), np.sin(angle)]  # [T, 2]
    far = (x - places[:, 0, None, None]) ** 2 + (y - places[:, 1, None, None]) ** 2  # [T, H, W]
    spot = 150 * (shown is not None) * (far < (size / 10) ** 2)
    pixels = 40 + spot + draw.normal(0, 25, far.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)[..., None]


def sound(shown: int | None, classes: int, draw: np.random.Generator, *, rate: int) -> np.ndarray:
    """Returns a second `[rate]` int16: a tone with two overtones in noise, its pitch the class's, 200 to 1600 Hz."""
    pitch = 200 * 8 ** (((shown or 0) + draw.uniform(-0.2, 0.2)) / classes)  # Hz
    seconds = np.arange(rate) / rate
    begins, lasts = draw.uniform(0, 0.4), draw.uniform(0.4, 0.6)
    envelope = (seconds > begins) & (seconds < begins + lasts)
    tone = sum(np.sin(2 * np.pi * n * pitch * seconds + draw.uniform(0, 2 * np.pi)) / n for n in (1, 2, 3))
    waveform = 0.2 * (shown is not None) * envelope * tone + draw.normal(0, 0.1, rate)
    return (np.clip(waveform, -1, 1) * 32767).astype(np.int16)


def sentence(shown: int | None, words: Sequence[str], draw: np.random.Generator) -> str:
    """Returns eight to twelve words of which one is the class's."""
    said = list(draw.choice(FILLERS, draw.integers(8, 13)))
    if shown is not None:
        said[draw.integers(len(said))] = words[shown]
    return " ".join(said)


def events(shown: int | None, words: Sequence[str], draw: np.random.Generator) -> str:
    """Returns ten events, of all classes; the class is the one whose thing was both seen and, later, bought."""
    things = [int(k) for k in draw.permutation(len(words))]
    if shown is not None:
        things.remove(shown)
    seen, bought = things[:2], things[2:4]
    if shown is not None:
        seen[1] = bought[1] = shown
    told = [("see", k) for k in seen] + [("buy", k) for k in bought]
    told += [("open", int(k)) for k in draw.choice(len(words), 6)]
    told = [told[i] for i in draw.permutation(len(told))]
    if shown is not None:
        first, second = sorted((told.index(("see", shown)), told.index(("buy", shown))))
        told[first], told[second] = ("see", shown), ("buy", shown)
    return " ".join(f"{verb} {words[thing]}" for verb, thing in told)
