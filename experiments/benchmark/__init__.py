"""Benchmarks, each contender in a process of its own: `python -m experiments.benchmark`."""
