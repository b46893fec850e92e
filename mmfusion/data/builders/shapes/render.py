"""Renders the scenes of `shapes` in integer arithmetic, so that the pixels are the same on every machine."""

from collections.abc import Sequence

import numpy as np

from mmfusion.data.builders.shapes.scenes import COLOURS, Scene

SIZE = 32
CENTRES = np.array([7, 16, 24])  # of the three columns and rows, in pixels
PALETTE = np.array([[215, 45, 45], [40, 165, 60], [60, 80, 230], [225, 215, 50], [165, 60, 195], [60, 205, 215]])
assert len(PALETTE) == len(COLOURS)
NOISE = 16  # maximum absolute change of a channel, in pixel levels


def render(scenes: Sequence[Scene], source: np.random.Philox) -> np.ndarray:
    """Renders scenes on a noisy grey background, every object shifted by up to a pixel and in one of two sizes.

    Args:
      scenes: n scenes of one to four objects.
      source: the random bits of noise, shifts and sizes.

    Returns:
      images `[n, 32, 32, 3]` uint8.
    """
    n = len(scenes)
    slots = max(map(len, scenes))
    objects = np.array([(*scene, *[(-1, 0, 0)] * (slots - len(scene))) for scene in scenes])  # [n, slots, 3]
    many = np.array([len(scene) > 1 for scene in scenes])
    images = np.broadcast_to(_integers(source, 30, 110, (n, 1, 1, 1)), (n, SIZE, SIZE, 3))
    for colour, shape, position in objects.transpose(1, 2, 0):
        radius = 6 - 3 * many + _integers(source, 0, 2, n)  # smaller for several objects, which must not overlap
        column, row = (CENTRES[line] + _integers(source, -1, 2, n) for line in (position % 3, position // 3))
        x, y = (np.clip(centre, radius, SIZE - 1 - radius) for centre in (column, row))  # inside the image
        inside = _inside(shape, x, y, radius) & (colour >= 0)[:, None, None]  # [n, H, W]
        tint = PALETTE[colour] + _integers(source, -NOISE, NOISE + 1, (n, 3))
        images = np.where(inside[..., None], tint[:, None, None, :], images)
    noise = source.random_raw(n * SIZE * SIZE * 3 // 8).astype("<u8").view(np.uint8)
    noise = (noise % (2 * NOISE + 1)).reshape(n, SIZE, SIZE, 3).astype(np.int16) - NOISE
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def _integers(source: np.random.Philox, low: int, high: int, shape: int | tuple[int, ...]) -> np.ndarray:
    draws = source.random_raw(int(np.prod(shape))) % np.uint64(high - low)
    return draws.astype(np.int64).reshape(shape) + low


def _inside(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Returns the mask `[n, H, W]` of the pixels of a circle, square, triangle, diamond or cross."""
    grid = np.arange(SIZE, dtype=np.int16)
    shape, x, y, radius = (a.astype(np.int16)[:, None, None] for a in (shape, x, y, radius))  # [n, 1, 1]
    dx, dy = np.abs(grid[None, None, :] - x), grid[None, :, None] - y
    ady = np.abs(dy)
    return np.select(
        [shape == 0, shape == 1, shape == 2, shape == 3],
        [
            dx * dx + dy * dy <= radius * radius + 1,
            np.maximum(dx, ady) < radius,
            (ady <= radius) & (2 * dx <= dy + radius),
            dx + ady <= radius,
        ],
        (np.minimum(dx, ady) <= 1) & (np.maximum(dx, ady) <= radius),
    )
