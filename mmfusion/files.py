"""Folders that are moved and copied, in a bucket, too, and files that a power loss leaves."""

import os

from etils import epath


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder to where there is none yet; it may be in a bucket."""
    if "://" not in str(folder):
        folder.rename(target)
        return
    copy_tree(folder, target)  # a bucket has no folders that could be renamed
    folder.rmtree()


def copy_tree(folder: epath.Path, target: epath.Path) -> None:
    """Copies a folder's files; each of the two may be in a bucket."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            path.copy(target / path.name)


def sync(folder: str | os.PathLike) -> None:
    """Brings a folder's files, their names and its own to the disk, where a power loss leaves them."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in [*(os.path.join(place, name) for name in names), place]:
            sync_file(name)
    sync_file(os.path.dirname(os.path.abspath(folder)))


def sync_file(path: str | os.PathLike) -> None:
    """Brings a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
