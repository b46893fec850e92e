"""Embeddings: one precomputed vector a row, from one feature or several that are concatenated.

D dimensions
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import numeric
from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.errors import UserError

NORMALIZATIONS = ("standard", "l2", "none")
OPTIONS = {
    "normalize": "standard",  # by each dimension's mean and standard deviation over train; "l2": unit length; or "none"
}
EXPECTED = "a vector such as [0.1, 0.2]"


def _read(name: str, value: Any) -> np.ndarray | None:
    """Returns a feature's vector `[d]`, of one element for a number; None if it is missing or all NaN."""
    vector = numeric.read(value, f"{EXPECTED} in {name!r}")
    if vector is None or np.isnan(vector).all():
        return None
    if vector.ndim > 1:
        raise ValueError(f"must be {EXPECTED} in {name!r}, got an array {list(vector.shape)}")
    return vector.reshape(-1)


def _vector(value: Mapping[str, Any], sizes: Mapping[str, int]) -> np.ndarray | None:
    """Returns a row's vector `[D]`; None if every feature is missing.

    Raises:
      ValueError: a feature is missing beside others, has another size, or has values that are not finite.
    """
    parts = {name: _read(name, value[name]) for name in sizes}
    if all(part is None for part in parts.values()):
        return None
    for name, size in sizes.items():
        part = parts[name]
        if part is None:
            raise ValueError(f"{name!r} is missing, and other parts of the vector are not")
        if len(part) != size:
            raise ValueError(f"{name!r} has {len(part)} values, not {size} as on train")
        if not np.isfinite(part).all():
            raise ValueError(f"{name!r} has values that are not finite")
    return np.concatenate([part for part in parts.values() if part is not None])


def _fit(values: Sequence[Mapping[str, Any]], options: Options) -> str:
    """Returns each feature's most frequent size, and the mean and standard deviation of each dimension, as JSON.

    Vectors of another size and unreadable ones are left out; they are the errors of their rows.
    """
    names = options["feature"].split("+")
    counts: dict[str, Counter] = {name: Counter() for name in names}
    errors: list[ValueError] = []
    for value in values:
        for name in names:
            try:
                part = _read(name, value[name])
            except ValueError as error:
                errors.append(error)
            else:
                counts[name].update([] if part is None else [len(part)])
    for name in names:
        if not counts[name]:
            message = str(errors[0]) if errors else "has no vector in any training row"
            raise UserError(message, path=f"feature {name}") from (errors[0] if errors else None)
    sizes = {name: counts[name].most_common(1)[0][0] for name in names}

    def vectors():
        for value in values:
            try:
                vector = _vector(value, sizes)
            except ValueError:
                continue
            if vector is not None:
                yield vector[None]

    mean, std = numeric.statistics(vectors())
    dimensions = (sum(sizes.values()),)  # also without a readable row
    mean, std = np.broadcast_to(mean, dimensions), np.broadcast_to(std, dimensions)
    return json.dumps({"sizes": sizes, "mean": mean.tolist(), "std": std.tolist()})


def _shape(options: Options, fitted: Mapping[str, Any]) -> tuple[tuple[int, ...], Any, int]:
    return (sum(fitted["sizes"].values()),), np.float32, 1


def _decode(value: Mapping[str, Any], options: Options, fitted: Mapping[str, Any]) -> Decoded:
    vector = _vector(value, fitted["sizes"])
    if vector is None:
        return None
    if options["normalize"] == "standard":
        vector = (vector - fitted["mean"]) / fitted["std"]
    elif options["normalize"] == "l2":
        vector = vector / (np.linalg.norm(vector) or 1.0)  # zeros stay zeros
    vector = np.clip(vector, -numeric.LIMIT, numeric.LIMIT)
    return vector.astype(np.float32), np.ones(1, bool)


TYPE = ModalityType(
    OPTIONS, _shape, _decode, fit=_fit, load=json.loads, takes=("array[1]", "number"), several_features=True
)
