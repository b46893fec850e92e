"""What the config of a run may name: code to import, and places to read from, only those that the user has named, too.

A run's directory may come from someone else. What a user trains with is theirs: its modules and places are kept in a
file of the home directory (`$XDG_STATE_HOME/mmfusion/trusted`), and whatever another run names must be among them.
"""

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmfusion.data.preparation import CLASS
from mmfusion.data.sources import PAIR
from mmfusion.data.table_dataset import is_table
from mmfusion.data.text import FILES
from mmfusion.errors import UserError

FILE = "trusted"  # a line for each module or place, as a JSON string
DATASETS = ("data.name", "data.fallback_name", "data.instead")  # the last one is deprecated
VERSIONED = re.compile(r"[\w/.+-]+:[\d*]+(\.[\d*]+)*")  # a TFDS dataset and its version
RUN = "run:"
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")
REMEDY = "--trust of experiments.predict or evaluate, or trust=True of mmfusion.load, accepts it"

_named: set[str] = set()  # in this process


def remember(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Trusts the modules and places of a config, now and in later processes of this user, and returns the config.

    Args:
      values: a config that the user gave or accepted, as JSON values.
    """
    named = {name for _, name in (*modules(values), *places(values))} - _trusted()
    _named.update(named)
    with contextlib.suppress(OSError, RuntimeError):  # without a writable home directory, for this process only
        if named:
            _file().parent.mkdir(parents=True, exist_ok=True)
            with _file().open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(name)}\n" for name in sorted(named)))
    return values


def name_place(place: str) -> None:
    """Trusts a place in this process, as the user has named it to the command or function that runs."""
    _named.add(_absolute(place))


def checked(values: Mapping[str, Any], path: str | os.PathLike) -> Mapping[str, Any]:
    """Returns the config of a run, JSON values read from `path`; raises UserError if it names a module not trusted."""
    trusted = _trusted()
    for key, name in modules(values):
        if name not in trusted:
            message = f"{path} names code that you have not trained with: {REMEDY}"
            raise UserError(message, path=f"config.{key}", value=name)
    return values


def check_places(values: Mapping[str, Any], given: Collection[str] = ()) -> None:
    """Checks the places of a run's config before they are read.

    Args:
      values: the config, or its section `data`, as a mapping.
      given: the keys of places that the user has just given.

    Raises:
      UserError: one of the others is not trusted.
    """
    trusted = _trusted()
    for key, place in places(values):
        if key not in given and place not in trusted:
            message = f"the run's config names a place that you have not trained with: give it again, or {REMEDY}"
            raise UserError(message, path=f"config.{key}", value=place)


def modules(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the key and the name of each `package.module:Class`, and of each TFDS dataset of other packages."""
    for key, value in values.items() if isinstance(values, Mapping) else ():
        where = f"{path}.{key}" if path else str(key)
        names = [str(key)] if path == "objectives" else []
        if isinstance(value, str) and key in ("name", "kind", *(name.rpartition(".")[2] for name in DATASETS)):
            names += _dataset_modules(value) if where in DATASETS else [value]
        yield from ((where, name) for name in names if ":" in name and not name.startswith("mmfusion."))
        yield from modules(value, where)


def _dataset_modules(name: str) -> list[str]:
    if match := PAIR.match(name):
        return [part for group in ("first", "second") for part in _dataset_modules(match[group])]
    is_data = (is_table(name) and not CLASS.match(name)) or VERSIONED.fullmatch(name)
    return [] if is_data else [name]


def places(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the key and the absolute path of each folder, table, tokenizer and other file that a config names."""
    data = _section(values, "data") if "data" in values else values
    for key in ("dir", "manual_dir", "cache"):
        if data.get(key) and data[key] not in ("auto", "off"):
            yield f"data.{key}", _absolute(data[key])
    for key in DATASETS:
        name = data.get(key.rpartition(".")[2])
        if isinstance(name, str) and is_table(name):
            yield key, _absolute(name)
    if data is values:
        return
    for modality, options in _section(data, "modalities").items():
        for key in ("tokenizer", "triples"):
            file = options.get(key, "") if isinstance(options, Mapping) else ""
            if isinstance(file, str) and file and (key == "triples" or file.endswith(FILES)):
                yield f"data.modalities.{modality}.{key}", _absolute(file)
    for modality, options in _section(_section(values, "model"), "encoders").items():
        init = options.get("init") if isinstance(options, Mapping) else ""
        if isinstance(init, str) and init:
            is_hub = HUB.fullmatch(init) and not os.path.exists(init)
            yield f"model.encoders.{modality}.init", init if is_hub else _absolute(init)


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _absolute(place: Any) -> str:
    place = str(place)
    if place.startswith(RUN):
        return RUN + _absolute(place.removeprefix(RUN))
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


def _file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mmfusion" / FILE


def _trusted() -> set[str]:
    """Returns what this process and earlier ones have trusted; a damaged line is left out."""
    result = set(_named)
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        for line in _file().read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                result.add(str(json.loads(line)))
    return result
