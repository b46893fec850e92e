"""Benchmarks, as ratios of measurements in one process: `python -m experiments.benchmark [NAME ...]`."""
