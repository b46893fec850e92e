"""Functions that prepare and read a dataset, and that write archives for it."""

import os
import re
import zipfile

import tensorflow_datasets as tfds

from mmfusion.data.builders import archives


def prepare(name: str, data_dir, manual_dir=None):
    builder = tfds.builder(name, data_dir=data_dir)
    config = tfds.download.DownloadConfig(manual_dir=manual_dir)
    builder.download_and_prepare(file_format="array_record", download_config=config)
    return builder


def rows(builder, split: str, n: int | None = None) -> list[dict]:
    source = builder.as_data_source(split)
    return [source[i] for i in range(n or len(source))]


def write_zip(path, members: dict[str, bytes], top: str = "top-main/") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in members.items():
            file.writestr(top + name, data)


def as_known_archive(path, url: str = "https://example.org/a.zip", members: str = r"data/.*") -> archives.Archive:
    """Returns the declaration of an archive with the current content of the file at `path`."""
    with zipfile.ZipFile(path) as file:
        infos = {i.filename.partition("/")[2]: i for i in file.infolist()}
    infos = {name: i for name, i in infos.items() if re.fullmatch(members, name)}
    return archives.Archive(os.path.basename(path), url, members, len(infos), archives.fingerprint(infos))
