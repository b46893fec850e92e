"""Random configs and hostile archives: each is accepted, or refused in one line."""

import io
import random
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from experiments import cli
from mmfusion import config as configs
from mmfusion.errors import UserError
from tests.processes import ROOT
from tests.reliability.faults import Outcome

SOURCES = sorted(
    path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "table")
)
STRINGS = (
    "",
    "x",
    "concat",
    "adamw",
    "cnn",
    "accuracy",
    "a/b",
    "../..",
    "gs://b",
    "\u00e9\u4e2d",
    "None",
    "1",
    "-1",
    "a" * 999,
)
NUMBERS = (
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "1e308",
    "1e309",
    "-1e309",
    "nan",
    "1e-300",
    "0.5",
    str(2**31),
    str(2**64),
    "1_0",
)
OTHERS = ("True", "False", "()", "(1,)", "(1,2,3)", "(0,-1)", "('a',)", "{}", "[", "(1", "'", "\\", "{'a': 1}")
ARGUMENTS = ("fusion", "seed", "modalities", "objectives", "encoders", "variant", "size", "data", "classes", "", "x")


def fuzzed_configs(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Checks configs of random arguments and overrides."""
    del folder, locations

    draw = random.Random(0)
    paths = {source: _paths(cli.make_config(str(source), ())) for source in SOURCES}
    for _ in range(count):
        source = draw.choice(SOURCES)
        values = [*STRINGS, *NUMBERS, *OTHERS]
        arguments = [f"{draw.choice(ARGUMENTS)}={draw.choice(values)}" for _ in range(draw.choice((0, 0, 1, 2)))]
        overrides = [
            f"--config.{_misspelled(draw, draw.choice(paths[source]))}={draw.choice(values)}"
            for _ in range(draw.randint(0, 4))
        ]
        given = f"{source}:{','.join(arguments)}" if arguments else str(source)
        try:
            config = cli.make_config(given, overrides)
            configs.check(config, 1)
            yield True, ""
        except UserError as error:
            yield "\n" not in str(error) and bool(str(error)), f"{given} {overrides}: {error!r}"
        except Exception as error:
            yield False, f"{given} {overrides}: {error!r}"


def _paths(config: ConfigDict, path: str = "") -> list[str]:
    found = []
    for key in config:
        found.append(path + key)
        if isinstance(config[key], ConfigDict):
            found += _paths(config[key], f"{path}{key}.")
    return found


def _misspelled(draw: random.Random, path: str) -> str:
    if draw.random() > 0.1:
        return path
    place = draw.randrange(len(path))
    return path[:place] + draw.choice(("", "x", ".", "..")) + path[place + 1 :]


def fuzzed_archives(count: int, folder: Path, locations: Sequence[str]) -> Iterator[Outcome]:
    """Changes an archive's bytes or adds hostile members: it is read as it was, or refused in one line."""
    del locations
    from mmfusion.data.builders import archives

    contents = {f"data/{i}.txt": f"row {i} ".encode() * (i + 1) for i in range(12)}
    original = _zip({f"top/{name}": data for name, data in contents.items()})
    with zipfile.ZipFile(io.BytesIO(original)) as file:
        digest = archives.fingerprint({info.filename.partition("/")[2]: info for info in file.infolist()})
    archive = archives.Archive("a.zip", "https://example.org/a.zip", r"data/\d+\.txt", len(contents), digest)
    draw = random.Random(0)
    for number in range(count):
        path = folder / f"{number}.zip"
        path.write_bytes(_damaged(draw, original, contents))
        try:
            names = archives.check(archive, str(path))
            same = archives.read(archive, str(path), names) == contents
            yield same, f"archive {number}: other contents were accepted"
        except UserError as error:
            yield "\n" not in str(error), f"archive {number}: {error!r}"
        except Exception as error:
            yield False, f"archive {number}: {error!r}"
        path.unlink()


def _damaged(draw: random.Random, original: bytes, contents: dict[str, bytes]) -> bytes:
    way = draw.randrange(5)
    data = bytearray(original)
    if way == 0:  # bytes changed
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif way == 1:  # cut off, at either end
        data = data[: draw.randrange(len(data))] if draw.random() < 0.7 else data[draw.randrange(len(data)) :]
    elif way == 2:  # a piece taken out, or put in twice
        first, last = sorted(draw.sample(range(len(data)), 2))
        data = data[:first] + data[last:] if draw.random() < 0.5 else data[:last] + data[first:]
    else:  # a member more: one that leaves the folder, a link, one of the known names with other contents
        names = ("../out.txt", "/etc/out", "top/../../out", "C:\\out", "top/data/3.txt", "top/data/99.txt", "top\\data")
        extra = zipfile.ZipInfo(draw.choice(names))
        if draw.random() < 0.3:
            extra.external_attr = 0o120777 << 16  # a link
        members = {f"top/{name}": body for name, body in contents.items() if way == 3 or draw.random() < 0.9}
        return _zip(members, extra, b"/etc/passwd" * draw.choice((1, 10**5)))
    return bytes(data)


def _zip(members: dict[str, bytes], extra: zipfile.ZipInfo | None = None, body: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data)
        if extra is not None:
            file.writestr(extra, body)
    return buffer.getvalue()
