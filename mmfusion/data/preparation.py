"""Finds TFDS builders by name, and prepares their datasets on first use."""

import contextlib
import io
import os
import re
import sys
import urllib.error

from etils import epy

from mmfusion.data.prepared_files import check_prepared
from mmfusion.errors import UserError, one_line, warn_renamed
from mmfusion.files import DISK_FULL
from mmfusion.registry import lookup

with epy.lazy_imports():
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, downloader

    from mmfusion.data import builders

# `package.module:Class[/variant]`; a TFDS version or namespace (`mnist:3.0.1`, `huggingface:name`) is lower case.
CLASS = re.compile(r"(?P<builder>[A-Za-z_][\w.]*:[A-Z]\w*)(/(?P<variant>.+))?$")
# Deprecated names, supported for one version.
RENAMED_DATASETS = {
    "stand_ins": "synthetic",
    "stand_ins/three_pictures": "synthetic/three_images",
    "stand_ins/sound_pictures": "synthetic/audio_images",
}


def current_name(name: str) -> str:
    """Returns the current name of a dataset, with a warning on standard error for a deprecated name."""
    base, slash, variant = name.partition("/")
    new = RENAMED_DATASETS.get(name) or RENAMED_DATASETS.get(base, base) + slash + variant
    if new != name:
        warn_renamed(f"dataset {name}", new)
    return new


def builder_class(name: str) -> "tuple[type[tfds.core.DatasetBuilder] | None, str]":
    """Returns the builder class of this package or of `package.module:Class`, None for TFDS's own, and the variant.

    Raises:
      UserError: the module cannot be imported, or has no such builder.
    """
    base, _, variant = name.partition("/")
    if match := CLASS.match(name):
        base, variant = match["builder"], match["variant"] or ""
        found = lookup(builders.BUILDERS, base, "config.data.name")
        if not issubclass(found, tfds.core.DatasetBuilder):
            raise UserError("the class is not a TFDS builder", path="config.data.name", value=name)
        return found, variant
    return builders.BUILDERS.get(base), variant


def make_builder(name: str, data_dir: str) -> "tfds.core.DatasetBuilder":
    """Returns the TFDS builder of a dataset.

    Raises:
      UserError: no such dataset, variant or version, a package that it needs is missing, there is no home directory, or
        a file of the prepared dataset names code that TFDS would import.
    """
    if not data_dir and "TFDS_DATA_DIR" not in os.environ and os.path.expanduser("~") == "~":
        raise UserError("there is no home directory for datasets: give a folder", path="config.data.dir")
    name = current_name(name)
    own, variant = builder_class(name)
    try:
        if own is not None:
            check_prepared(own.name, data_dir, own.__module__.partition(".")[0])
            return own(data_dir=data_dir or None, config=variant or None)
        check_prepared(name, data_dir)
        return tfds.builder(name, data_dir=data_dir or None)
    except UserError:
        raise
    except Exception as error:  # builders may raise any exception
        raise UserError(f"cannot be opened: {one_line(error)}", path="config.data.name", value=name) from error


def prepared_builder(name: str, data_dir: str, manual_dir: str) -> "tfds.core.DatasetBuilder":
    """Returns the TFDS builder of a dataset, and prepares the dataset if needed.

    Raises:
      UserError: the dataset cannot be prepared; the message suggests a remedy.
    """
    builder = make_builder(name, data_dir)
    if builder.is_prepared():
        return builder
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    downloader.MAX_RETRIES = 5  # without a network, TFDS's default of ten takes more than three minutes
    print(f"data   preparing {name} under {builder.data_dir}", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # hides TFDS's warning about unknown sizes
            builder.download_and_prepare(
                file_format=tfds.core.FileFormat.ARRAY_RECORD,
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )
    except Exception as error:
        if isinstance(error, FileExistsError) and builder.data_path.exists():
            return prepared_builder(name, data_dir, manual_dir)  # another process has prepared it
        if explained := _explain(name, data_dir, error):
            raise explained from error
        raise
    return builder


def _explain(name: str, data_dir: str, error: Exception) -> UserError | None:
    """Returns an error with a remedy for a failed preparation; None if the user cannot fix it."""
    cause: BaseException | None = error
    while cause is not None:  # TFDS re-raises errors with more context, but without their attributes
        if isinstance(cause, UserError):
            return UserError(cause.message, path=cause.path, value=cause.value, choices=cause.choices)
        if message := _explain_cause(data_dir, cause):
            return UserError(message, path="config.data.name", value=name)
        cause = cause.__cause__
    return None


def _explain_cause(data_dir: str, cause: BaseException) -> str:
    summary, folder = one_line(cause), data_dir or "the TFDS folder"
    if isinstance(cause, (requests.RequestException, urllib.error.URLError, tfds.download.DownloadError)):
        url = getattr(getattr(cause, "request", None), "url", None) or "its files"
        return (
            f"not prepared yet, and {url} cannot be downloaded ({summary}): connect to the network, or download the "
            "files by hand into a folder and set --config.data.manual_dir=FOLDER"
        )
    if isinstance(cause, download_manager.NonMatchingChecksumError):
        return f"a file is corrupt or not the known one; remove it and start again ({summary})"
    # Errors of ArrayRecord have a text alone.
    full = getattr(cause, "errno", None) in DISK_FULL or any(os.strerror(number) in summary for number in DISK_FULL)
    if full or "Not enough disk space" in summary:
        return f"no space left to prepare it under {folder} ({summary})"
    if isinstance(cause, (PermissionError, NotADirectoryError)):
        return f"cannot write {cause.filename or data_dir}: set --config.data.dir to a folder of yours"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"cannot be prepared under {folder}: {summary}"
    if isinstance(cause, (ImportError, RuntimeError)) and "tensorflow" in summary.lower():
        return (
            "needs TensorFlow once, to prepare: pip install '.[prepare]' in the repository (tensorflow-cpu), then run "
            "the same command"
        )
    if isinstance(cause, AssertionError) and "manual" in summary.lower():
        return f"must be downloaded by hand: --config.data.manual_dir=FOLDER ({summary})"
    return ""
