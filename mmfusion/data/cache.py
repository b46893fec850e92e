"""Keeps what is computed from rows on disk between runs, under a digest of everything that it depends on."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mmfusion import files
from mmfusion.data.modalities import MODALITY_TYPES
from mmfusion.data.modality_type import Options
from mmfusion.data.sources import Source
from mmfusion.errors import UserError

T = TypeVar("T")
AUTO, OFF = "auto", "off"
DISK_SHARE = 0.5  # of the free space, which an entry may take
DAYS = 30  # since the last use, after which an entry is removed
SECONDS = 0.2  # what takes less is not remembered
NAME = re.compile(r"[0-9a-f]{32}(\.json|\.part)?")
PACKAGES = ("numpy", "pillow", "scipy", "soundfile", "tensorflow-datasets", "tokenizers")  # that decode


class Cache:
    """A folder whose content may be deleted at any time.

    Attributes:
      folder: the folder; None: nothing is kept.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def path(self, key: Sequence[Any]) -> Path | None:
        """Returns the path that belongs to a key of JSON values; None if nothing is kept, or if one of them is None."""
        if self.folder is None or any(part is None for part in key):
            return None
        return self.folder / hashlib.sha256(json.dumps([code(), key], sort_keys=True).encode()).hexdigest()[:32]

    def remember(self, key: Sequence[Any], compute: Callable[[], T]) -> T:
        """Returns the JSON value of `compute()`, which is called only once for a key if it takes long."""
        path = self.path(key)
        if path is None:
            return compute()
        path = path.with_suffix(".json")
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(path.read_text())
            os.utime(path)
            return value
        start = time.thread_time()
        value = compute()
        if time.thread_time() - start > SECONDS:
            with contextlib.suppress(OSError):  # a full disk
                files.write_json(path, value)
        return value

    def refuse(self, size: int) -> str:
        """Makes room for `size` bytes, or returns why they are not kept.

        Raises:
          OSError: the folder cannot be read.
        """
        assert self.folder is not None
        free = shutil.disk_usage(self.folder).free
        if size > DISK_SHARE * free:
            return f"they need {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        self.remove_unused()
        return ""

    def remove_unused(self) -> None:
        """Removes what no run has used for `DAYS`."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process has removed it
                if NAME.fullmatch(path.name) and path.stat().st_mtime < time.time() - DAYS * 24 * 3600:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(description: Any) -> str:
    """Returns a digest of JSON values."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def auto_folder() -> Path:
    """Returns the folder of `config.data.cache=auto`; raises RuntimeError without a home directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmfusion" / "rows"


def open_cache(setting: str) -> Cache:
    """Returns the cache of `config.data.cache`; without a writable home directory, `auto` keeps nothing.

    Raises:
      UserError: a folder that cannot be written.
    """
    if setting == OFF:
        return Cache(None)
    try:
        folder = (auto_folder() if setting == AUTO else Path(setting)).expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        if setting == AUTO:
            return Cache(None)
        message = f"cannot be written ({getattr(error, 'strerror', error)}); give another folder, or {OFF!r}"
        raise UserError(message, path="config.data.cache", value=setting) from error
    return Cache(folder)


def source_key(source: Source, modalities: Mapping[str, Options]) -> list[Any] | None:
    """Returns the part of a key that stands for a source's rows and the files that modalities read; None: unknown.

    Modality types from outside may depend on anything, so that nothing which depends on them is kept.
    """
    texts = [value for options in modalities.values() for value in options.values() if isinstance(value, str)]
    known = all(options["kind"] in MODALITY_TYPES for options in modalities.values())
    if not source.file_digest or not known or any("://" in text for text in texts):
        return None
    paths = {text: os.path.expanduser(text) for text in texts}
    read = {text: files.describe(path) for text, path in paths.items() if os.path.isfile(path)}  # such as a tokenizer
    return [source.version, source.file_digest, source.class_names, read]


@functools.cache
def code() -> str:
    """Returns a digest of the code that decodes: this package's files, and the versions of others."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for name in PACKAGES:
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    return digest.hexdigest()
