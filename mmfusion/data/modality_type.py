"""The contract of a modality type, which decodes a raw value into an array of fixed shape and a mask."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Options = Mapping[str, Any]
Decoded = tuple[np.ndarray, np.ndarray] | None  # an input and its mask [N]; None: the value is absent


def is_missing(value: Any) -> bool:
    """Returns whether a raw value is absent: None, NaN, or without elements.

    Raises:
      ValueError: it has no length, as a number.
    """
    if value is None:
        return True
    try:
        return len(value) == 0
    except TypeError as error:
        if isinstance(value, float | np.floating) and math.isnan(value):
            return True
        raise ValueError(f"must not be a single {type(value).__name__}") from error


def _no_encoder_kwargs(options: Options, fitted: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True)
class ModalityType:
    """The functions that read modalities of one type; `fitted` is None for types without `fit`.

    Attributes:
      options: the config keys of modalities of this type with their defaults, beside `kind` and `feature`.
      shape: (options, fitted) -> shape of one input, its dtype, and its number of positions N.
      decode: (value, options, fitted) -> the input and its mask `[N]`, or None if the value is absent. It raises
        ValueError with a short message if the value cannot be read.
      fit: (values of the training rows, options) -> the fitted state, as a string that is saved with the run; empty:
        none is needed.
      fit_rows: the number of training rows that `fit` is given at most.
      load: (output of `fit`) -> `fitted`.
      encoder_kwargs: (options, fitted) -> arguments of the modality's encoder that depend on the data.
      unknown: (inputs `[n, ...]`, masks `[n, N]`, options, fitted) -> per kind of value such as a column, how many
        values the fitted state does not know, and of how many.
      takes: the forms of features (see `features.Feature`) that it is read from; empty: any.
      several_features: whether `feature` may have several names, joined by `+`; the value is then a dict of features.
      class_names: whether class features are passed as names instead of integers.
      augment: (inputs `[B, ...]`, one random key per example `[B]`, `options["augment"]`) -> inputs; inside jit.
      normalize: (inputs `[B, ...]`, options) -> inputs; inside jit.
    """

    options: dict[str, Any]
    shape: Callable[[Options, Any], tuple[tuple[int, ...], Any, int]]
    decode: Callable[[Any, Options, Any], Decoded]
    fit: Callable[[Sequence[Any], Options], str] | None = None
    fit_rows: int = 100_000  # so that streamed splits need not be read completely
    load: Callable[[str], Any] = str
    encoder_kwargs: Callable[[Options, Any], dict[str, Any]] = _no_encoder_kwargs
    unknown: Callable[[np.ndarray, np.ndarray, Options, Any], dict[str, tuple[int, int]]] | None = None
    takes: tuple[str, ...] = ()
    several_features: bool = False
    class_names: bool = False
    augment: Callable[[jax.Array, jax.Array, Mapping[str, float]], jax.Array] | None = None
    normalize: Callable[[jax.Array, Options], jax.Array] | None = None
