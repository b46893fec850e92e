"""Fusing modalities in JAX: encoders, fusion strategies, and a pure parallel train step."""

from mmfusion.version import __version__

__all__ = ["__version__"]
