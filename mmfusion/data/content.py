"""Checksums of all rows of a split as stored, computed once and kept until the files that they are read from change.

That of a prepared dataset is kept in its folder, so that not every host and container reads the whole dataset again;
others are kept in the cache of `config.data.cache`.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import xxhash
from etils import epath

from mmfusion import files
from mmfusion.data.cache import Cache, digest
from mmfusion.data.rows import PreparedRows, Rows, content, iterate, uncached
from mmfusion.data.sources import KEPT, Source

WHOLE = "all:"  # begins a checksum of all rows; those of older versions are of `SAMPLE` rows
SAMPLE = 100


def checksums(opened: Mapping[str, Source], cache: Cache) -> dict[str, str]:
    """Returns the checksum of the rows of each split."""
    return {split: _kept(split, source, cache) for split, source in opened.items()}


def matches(before: str, now: str, rows: Rows) -> bool:
    """Returns whether a checksum that a run saved is that of these rows, whose own one is `now`."""
    return before == (now if before.startswith(WHOLE) else sampled_checksum(rows))


def checksum(rows: Rows, ids: np.ndarray) -> str:
    """Returns the checksum of the rows `ids` `[n]`, as stored."""
    return WHOLE + _hexdigest(xxhash.xxh3_128(), iterate(rows, ids))


def sampled_checksum(rows: Rows) -> str:
    """Returns the checksum of older versions, of evenly spaced rows."""
    return _hexdigest(xxhash.xxh3_64(), iterate(rows, np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))))


def _hexdigest(hasher: Any, rows: Iterable[Mapping[str, Any]]) -> str:
    for row in rows:
        for part in content(row):
            hasher.update(f"{len(part)} ".encode() + part)  # the length separates the parts
    return hasher.hexdigest()


def _kept(split: str, source: Source, cache: Cache) -> str:
    rows = uncached(source.rows)
    ids = np.arange(len(rows)) if source.members is None else source.members[split]
    key = ["content", source.version, source.file_digest or None, digest(ids.tolist())]

    def compute() -> str:
        return cache.remember(key, lambda: checksum(source.rows, ids))

    if isinstance(rows, PreparedRows) and (described := _describe(rows.folder)):
        return _kept_beside(epath.Path(rows.folder) / KEPT, described, source.version, compute)
    return compute()


def _kept_beside(path: epath.Path, described: str, version: str, compute: Callable[[], str]) -> str:
    """Returns the checksum in the folder of a prepared dataset; otherwise computes it, and keeps it there if it can."""
    splits: dict[str, str] = {}
    with contextlib.suppress(Exception):  # any of a bucket's client library, or of a file that is not ours
        kept = json.loads(path.read_text())
        splits = dict(kept["splits"]) if kept["files"] == described else {}
    if version not in splits:
        splits[version] = compute()
        with contextlib.suppress(Exception):  # it may be read-only
            files.write_json(str(path), {"files": described, "splits": splits})
    return splits[version]


def _describe(folder: str) -> str:
    """Returns a digest of the names, sizes and times of the files of a prepared dataset; "" without a folder."""
    texts = []
    with contextlib.suppress(Exception):
        for path in sorted(epath.Path(folder).iterdir()):
            if path.name != KEPT and "://" in folder:
                texts.append(f"{path.name}\0{path.stat().length} {path.stat().mtime}")
            elif path.name != KEPT:
                texts.append(f"{path.name}\0{files.describe(str(path))}")
    return digest(texts) if texts else ""
