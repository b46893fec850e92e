"""Sequences of vectors: features of MOSI and MOSEI, time series, sensor data; padded with a mask.

t T positions · D dimensions
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfusion.data import numeric
from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.errors import UserError

NORMALIZATIONS = ("standard", "none")
OPTIONS = {
    "length": 50,  # positions; longer sequences are truncated, shorter ones padded at the end
    "normalize": "standard",  # by each dimension's mean and standard deviation over train's positions; or "none"
}
EXPECTED = "numbers [t, D], such as [[0.1, 0.2], [0.3, 0.4]]"


def _read(value: Any) -> np.ndarray | None:
    """Returns a sequence as `[t, D]` float64; `[t]` is `[t, 1]`, and no value is None."""
    array = numeric.read(value, EXPECTED)
    if array is None:
        return None
    if array.ndim not in (1, 2):
        raise ValueError(f"must be {EXPECTED}, got {f'an array {list(array.shape)}' if array.ndim else 'a number'}")
    return array[:, None] if array.ndim == 1 else array


def _fit(values: Sequence[Any], options: Options) -> str:
    """Returns the mean and standard deviation `[D]` of the finite values of the first T positions, as JSON.

    D is the most frequent one. Sequences of another D and unreadable ones are left out; they are errors of their rows.

    Raises:
      UserError: no training row has a sequence, or they look like `[D, t]`.
    """
    shapes: Counter = Counter()
    errors: list[ValueError] = []
    for value in values:
        try:
            array = _read(value)
        except ValueError as error:
            errors.append(error)
        else:
            shapes.update([] if array is None else [array.shape])
    path = f"feature {options['feature']}"
    if not shapes:
        message = str(errors[0]) if errors else "has no sequence in any training row"
        raise UserError(message, path=path) from (errors[0] if errors else None)
    sizes: Counter = Counter()
    for (_, size), count in shapes.items():
        sizes[size] += count
    size, count = sizes.most_common(1)[0]
    lengths = {length for length, _ in shapes}
    if count <= sizes.total() / 2 and len(lengths) == 1:
        message = f"has arrays [{lengths.pop()}, {min(sizes)} to {max(sizes)}]: transpose them, the first axis is time"
        raise UserError(message, path=path)

    def sequences():
        for value in values:
            try:
                array = _read(value)
            except ValueError:
                continue
            if array is not None and array.shape[1] == size:
                yield array[: options["length"]]

    mean, std = numeric.statistics(sequences())
    return json.dumps({"mean": mean.tolist(), "std": std.tolist()})


def _shape(options: Options, fitted: Mapping[str, Any]) -> tuple[tuple[int, ...], Any, int]:
    return (options["length"], len(fitted["mean"])), np.float32, options["length"]


def _decode(value: Any, options: Options, fitted: Mapping[str, Any]) -> Decoded:
    """Decodes a sequence `[t, D]`.

    A position without a finite value is masked. In other positions, values that are NaN or infinite are replaced by
    their dimension's mean over train, as features of MOSI and MOSEI contain -inf.
    """
    array = _read(value)
    if array is None:
        return None
    mean, std, length = np.array(fitted["mean"]), np.array(fitted["std"]), options["length"]
    if array.shape[1] != len(mean):
        transposed = array.shape[0] == len(mean)
        hint = "; it looks like [D, t]: transpose it, the first axis is time" if transposed else ""
        raise ValueError(f"is an array {list(array.shape)}, not [t, {len(mean)}] as on train{hint}")
    array = array[:length]
    finite = np.isfinite(array)
    array = np.where(finite, array, mean)
    if options["normalize"] == "standard":
        array = (array - mean) / std
    mask = np.zeros(length, bool)
    mask[: len(array)] = finite.any(axis=1)
    x = np.zeros((length, len(mean)), np.float32)
    x[: len(array)] = np.clip(array, -numeric.LIMIT, numeric.LIMIT)
    x[~mask] = 0
    return (x, mask) if mask.any() else None


def _encoder_kwargs(options: Options, fitted: Any) -> dict[str, Any]:
    return {"vocabulary": 0}  # vectors, not token ids


TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    fit=_fit,
    fit_rows=10_000,
    load=json.loads,
    encoder_kwargs=_encoder_kwargs,
    takes=("array[1]", "array[2]"),
)
