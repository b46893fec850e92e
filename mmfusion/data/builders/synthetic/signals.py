"""Synthetic signals that carry a class label: image, video, waveform, sentence, sequence of events.

Arguments are the label (None: the signal is uninformative), the number of classes or one word per class, and the random
generator.

H W image · C channels · T frames · S samples
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


def image(label: int | None, classes: int, random: np.random.Generator, *, size: int, channels: int) -> np.ndarray:
    """Returns pixels `[size, size, channels]` uint8: a noisy ellipse with stripes at the class's angle."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1  # -1 to 1
    centre, radius = random.uniform(-0.15, 0.15, 2), random.uniform(0.65, 0.9, 2)
    inside = ((x - centre[0]) / radius[0]) ** 2 + ((y - centre[1]) / radius[1]) ** 2 < 1
    angle = np.pi * ((label or 0) + random.uniform(-0.2, 0.2)) / classes
    phase = 9 * (x * np.cos(angle) + y * np.sin(angle)) + random.uniform(0, 2 * np.pi)
    stripes = (label is not None) * np.sin(phase)
    brightness = 40 + inside * (70 + 35 * stripes)
    tint = random.uniform(0.7, 1.3, channels)
    pixels = brightness[..., None] * tint + random.normal(0, 25, (size, size, channels))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def video(label: int | None, classes: int, random: np.random.Generator, *, size: int, frames: int) -> np.ndarray:
    """Returns pixels `[frames, size, size, 1]` uint8: a spot that moves in the class's direction."""
    y, x = np.mgrid[:size, :size]
    angle = 2 * np.pi * ((label or 0) + random.uniform(-0.2, 0.2)) / classes
    middle = size / 2 + random.uniform(-0.1, 0.1, 2) * size
    offsets = np.linspace(-0.35, 0.35, frames)[:, None] * size
    centres = middle + offsets * [np.cos(angle), np.sin(angle)]  # [T, 2]
    squared_distance = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2  # [T, H, W]
    spot = 150 * (label is not None) * (squared_distance < (size / 10) ** 2)
    pixels = 40 + spot + random.normal(0, 25, squared_distance.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)[..., None]


def audio(label: int | None, classes: int, random: np.random.Generator, *, rate: int) -> np.ndarray:
    """Returns one second `[rate]` int16: noise and a tone with two overtones at the class's pitch (200 to 1600 Hz)."""
    pitch = 200 * 8 ** (((label or 0) + random.uniform(-0.2, 0.2)) / classes)  # Hz
    seconds = np.arange(rate) / rate
    start, duration = random.uniform(0, 0.4), random.uniform(0.4, 0.6)
    envelope = (seconds > start) & (seconds < start + duration)
    tone = sum(np.sin(2 * np.pi * n * pitch * seconds + random.uniform(0, 2 * np.pi)) / n for n in (1, 2, 3))
    waveform = 0.2 * (label is not None) * envelope * tone + random.normal(0, 0.1, rate)
    return (np.clip(waveform, -1, 1) * 32767).astype(np.int16)


def sentence(label: int | None, words: Sequence[str], random: np.random.Generator) -> str:
    """Returns eight to twelve words, one of which is the class's word."""
    tokens = list(random.choice(FILLERS, random.integers(8, 13)))
    if label is not None:
        tokens[random.integers(len(tokens))] = words[label]
    return " ".join(tokens)


def events(label: int | None, words: Sequence[str], random: np.random.Generator) -> str:
    """Returns ten events over the classes' items; the label is the item that was both seen and, later, bought."""
    items = [int(item) for item in random.permutation(len(words))]
    if label is not None:
        items.remove(label)
    seen, bought = items[:2], items[2:4]
    if label is not None:
        seen[1] = bought[1] = label
    history = [("see", item) for item in seen] + [("buy", item) for item in bought]
    history += [("open", int(item)) for item in random.choice(len(words), 6)]
    history = [history[i] for i in random.permutation(len(history))]
    if label is not None:
        first, second = sorted((history.index(("see", label)), history.index(("buy", label))))
        history[first], history[second] = ("see", label), ("buy", label)
    return " ".join(f"{verb} {words[item]}" for verb, item in history)
