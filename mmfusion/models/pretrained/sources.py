"""Finds published models: a file, a folder, or a model on the Hugging Face hub, whose files are downloaded once.

Without a network, place a model's files in `~/.cache/mmfusion/hub/OWNER/NAME`, or name any folder that has them.
"""

import os
import re
import uuid
from pathlib import Path

from etils import epy

from mmfusion.errors import UserError

with epy.lazy_imports():
    import requests

CACHE = Path("~/.cache/mmfusion/hub")
HUB = "https://huggingface.co/{name}/resolve/main/{file}"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # no part is . or .., which would lead out of the cache
WEIGHTS = "model.safetensors"


def find(source: str, key: str = "init") -> Path | None:
    """Returns the file or folder of published weights, None for a model on the hub; raises UserError for neither.

    Args:
      source: a file, a folder, or `owner/name` of a model on the hub.
      key: the config key, for the error.
    """
    path = Path(os.path.expanduser(source))  # which takes ~ as a name where there is no home directory
    if path.exists():
        return path
    if HUB_NAME.fullmatch(source):
        return None
    raise UserError("no such file or folder, and not the owner/name of a model on the hub", path=key, value=source)


def fetch(name: str, cache: Path, file: str = WEIGHTS) -> Path | None:
    """Returns the path of a model's file in the folder of downloads; it is downloaded unless it is there.

    Args:
      name: `owner/name` of a model on the hub.
      cache: the folder for downloads.
      file: the name of the file.

    Returns:
      The path, or None if the model has no such file.

    Raises:
      UserError: the file cannot be downloaded.
    """
    target = cache.expanduser() / name / file
    if target.exists():
        return target
    url = HUB.format(name=name, file=file)
    try:
        with requests.get(url, stream=True, timeout=30) as response:
            if response.status_code == 404:
                return None
            response.raise_for_status()
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{uuid.uuid4().hex}.part")  # unique: other processes may download it, too
            with partial.open("wb") as output:
                for chunk in response.iter_content(1 << 20):
                    output.write(chunk)
            partial.replace(target)
    except requests.RequestException as error:
        raise UserError(
            f"no such local file, and {url} cannot be downloaded ({error}): place the model's files in "
            f"{target.parent}, or give the path of their folder",
            path="init",
            value=name,
        ) from error
    return target


def companion(source: str, file: str) -> Path | None:
    """Returns the path of a file that lies beside published weights, None if there is none; `~` stays as it is.

    Args:
      source: see `find`; a place that does not exist has no files.
      file: the name of the file.

    Raises:
      UserError: it cannot be downloaded.
    """
    path = Path(source)
    if HUB_NAME.fullmatch(source) and not path.exists():
        return CACHE / source / file if fetch(source, CACHE, file) else None
    return path / file if (path / file).expanduser().is_file() else None
