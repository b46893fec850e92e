"""How a config key is declared: a typed dataclass field with its default, its meaning, and what it may be."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

Options = Mapping[str, Any]  # what a choice reads beside the declared keys; declared where the choice is


@dataclasses.dataclass(frozen=True)
class Key:
    """What is known of a config key beside its type and default.

    Attributes:
      doc: what it means, one line.
      unit: of a number.
      minimum, maximum: the least and greatest value, themselves allowed.
      above, below: bounds that are themselves not allowed.
      choices: the allowed strings; empty: any.
      resume: why a run may continue with another value: "resource" (where things are and how fast) or "recovery" (what
        is done about failures, and how the step is compiled, on which all hosts must agree); empty: it may not.
    """

    doc: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    resume: str = ""

    def allowed(self) -> str:
        """Returns the allowed values in words; empty where any value of the type is."""
        if self.choices:
            return ", ".join(self.choices)
        bounds = (
            ("above", self.above), ("at least", self.minimum), ("below", self.below), ("at most", self.maximum),
        )  # fmt: skip
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None)

    def allows(self, number: float) -> bool:
        """Returns whether a number is finite and within the bounds."""
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def key(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    resume: str = "",
) -> Any:
    """Declares a config key as a dataclass field; the arguments are those of `Key`.

    A number whose least value is not given is at least 0.
    """
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    if number and minimum is None and above is None:
        minimum = 0
    declared = Key(doc, unit, minimum, maximum, above, below, choices, resume)
    return dataclasses.field(default=default, metadata={"key": declared})


def section(cls: type, doc: str) -> Any:
    """Declares a section with declared keys, those of the dataclass `cls`."""
    return dataclasses.field(default_factory=cls, metadata={"doc": doc})


def entries(doc: str, cls: type | None = None, *, of: str) -> Any:
    """Declares a section whose keys are names that a config chooses, one for each `of`.

    Each entry is a section with the keys of the dataclass `cls`; None: with options alone.
    """
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "entries": cls, "of": of})


def options(doc: str) -> Any:
    """Declares that a section has further keys, the options of what its `name` or `kind` chooses."""
    return dataclasses.field(default_factory=dict, metadata={"doc": doc, "options": True})


@dataclasses.dataclass(frozen=True)
class Choice:
    """A section with declared keys and, as `options`, those of what it chooses."""

    def to_dict(self) -> dict[str, Any]:
        """Returns declared keys and options side by side, as a config has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = values.pop("options")
        return {**values, **options}


def key_of(field: dataclasses.Field) -> Key | None:
    """Returns what is declared of a field that is a key; None of a section."""
    return field.metadata.get("key")


def section_of(field: dataclasses.Field) -> type | None:
    """Returns the dataclass of a field that is a section with declared keys; None of any other field."""
    return field.default_factory if dataclasses.is_dataclass(field.default_factory) else None  # pyright: ignore


def declared_keys(cls: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields the dotted path and the field of every declared key, in the order of declaration; `*` is any name."""
    for field in dataclasses.fields(cls):
        where = f"{path}{field.name}"
        if key_of(field):
            yield where, field
        elif inner := section_of(field):
            yield from declared_keys(inner, f"{where}.")
        elif inner := field.metadata.get("entries"):
            yield from declared_keys(inner, f"{where}.*.")


def declared_defaults(cls: type) -> dict[str, Any]:
    """Returns the defaults of a section's own declared keys."""
    return {field.name: field.default for field in dataclasses.fields(cls) if key_of(field)}
