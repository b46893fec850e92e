"""Checksums of arrays and JSON values, which show whether a checkpoint is what was saved."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xxhash

CHECKSUM = "checksum"  # key of a JSON object's own checksum


def checksums(tree: Any) -> dict[str, str]:
    """Returns `{path: checksum}` of a pytree of arrays."""
    return {path: checksum(np.asarray(leaf)) for path, leaf in flatten(tree).items()}


def checksum(array: np.ndarray) -> str:
    """Returns the 64-bit XXH3 of an array's dtype, shape and bytes."""
    digest = xxhash.xxh3_64(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())  # as bytes: not every dtype of JAX is a buffer
    return digest.hexdigest()


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the checksum of all its values."""
    return {**values, CHECKSUM: _digest(values)}


def has_valid_checksum(values: Mapping[str, Any]) -> bool:
    """Returns whether an object of `with_checksum` is unchanged after being written and read as JSON."""
    return values.get(CHECKSUM) == _digest({key: value for key, value in values.items() if key != CHECKSUM})


def _digest(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def flatten(tree: Any) -> dict[str, Any]:
    """Returns `{path: leaf}` of a pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def describe(tree: Any) -> dict[str, list[Any]]:
    """Returns `{path: [shape, dtype]}` of a pytree of arrays."""
    return {path: [list(leaf.shape), str(leaf.dtype)] for path, leaf in flatten(tree).items()}


def differences(expected: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf in which the descriptions of two pytrees differ, parameters first."""
    lines = []
    for path in sorted({*expected, *saved}, key=lambda p: (not p.startswith("params"), p)):
        if path not in saved:
            lines.append(f"{path} {expected[path][0]} is in the model, not in the checkpoint")
        elif path not in expected:
            lines.append(f"{path} {saved[path][0]} is in the checkpoint, not in the model")
        elif list(expected[path]) != list(saved[path]):
            (shape, dtype), (saved_shape, saved_dtype) = expected[path], saved[path]
            lines.append(f"{path} is {shape} {dtype} in the model, {saved_shape} {saved_dtype} in the checkpoint")
    return lines
