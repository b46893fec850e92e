"""Fusing modalities in JAX: encoders, fusion strategies, and a pure parallel train step."""

__version__ = "0.1.0"
