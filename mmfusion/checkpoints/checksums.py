"""Checksums of arrays and of JSON values, by which a checkpoint shows that it is what was saved."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xxhash

SEAL = "seal"  # key of a sealed object's own checksum


def checksums(tree: Any) -> dict[str, str]:
    """Returns `{path: checksum}` of a pytree of arrays: of each one's dtype, shape and bytes."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): checksum(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def checksum(array: np.ndarray) -> str:
    """Returns the 64-bit XXH3 of an array's dtype, shape and bytes."""
    digest = xxhash.xxh3_64(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())  # as bytes: not every dtype of JAX's is a buffer
    return digest.hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with the checksum of all its values."""
    return {**values, SEAL: _digest(values)}


def is_sealed(values: Mapping[str, Any]) -> bool:
    """Returns whether an object that `sealed` gave, written and read as JSON, is as it was."""
    return values.get(SEAL) == _digest({key: value for key, value in values.items() if key != SEAL})


def _digest(values: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def describe(tree: Any) -> dict[str, list[Any]]:
    """Returns `{path: [shape, dtype]}` of a pytree of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for path, x in leaves}


def compare(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf in which two descriptions differ, the model's parameters first."""
    lines = []
    for path in sorted({*wanted, *saved}, key=lambda p: (not p.startswith("params"), p)):
        if path not in saved:
            lines.append(f"{path} {wanted[path][0]} is in the model, not in the checkpoint")
        elif path not in wanted:
            lines.append(f"{path} {saved[path][0]} is in the checkpoint, not in the model")
        elif list(wanted[path]) != list(saved[path]):
            (shape, dtype), (saved_shape, saved_dtype) = wanted[path], saved[path]
            lines.append(f"{path} is {shape} {dtype} in the model, {saved_shape} {saved_dtype} in the checkpoint")
    return lines
