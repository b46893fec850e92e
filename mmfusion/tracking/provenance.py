"""Provenance of a result: versions, machine, flags and the commit of the code."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mmfusion.version import __version__

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_")  # prefixes of environment variables
PACKAGES = (  # on which results may depend
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "tensorflow-datasets", "pillow",
    "soundfile", "tokenizers", "safetensors", "ml-collections",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Returns JSON values: `versions`, `machine`, `flags` of XLA and JAX, and `commit` (None where it is unknown)."""
    return {
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)},
        "commit": commit(Path(__file__).parents[2]),
    }


def code(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of `environment()` on which results may depend: versions of packages and the commit."""
    return {"versions": made_with["versions"], "commit": made_with["commit"]}


def identity() -> dict[str, str | None]:
    """Returns the versions of packages and a digest of this package's code, which all hosts of a run must share."""
    return {**versions(), "code": code_digest(Path(__file__).parents[1])}


def code_digest(folder: Path) -> str:
    """Returns a digest of the Python files in a folder."""
    digest = xxhash.xxh3_64()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns the differences between two results of `code` as text, "" where there are none."""
    differences = [
        f"{package} was {before['versions'].get(package)} and is {version}"
        for package, version in now["versions"].items()
        if version != before["versions"].get(package)
    ]
    commits = [_describe(found) for found in (before["commit"], now["commit"])]
    if commits[0] != commits[1]:
        differences.append(f"the code was at commit {commits[0]} and is at {commits[1]}")
    return ", ".join(differences)


def _describe(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    return found["id"][:12] + (f" with changes ({found['changes']})" if found["dirty"] else "")


def versions() -> dict[str, str | None]:
    """Returns the versions of this package, of those on which results may depend, and of Python."""
    found = {name: _version(name) for name in PACKAGES}
    return {"mmfusion": __version__, **found, "python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # not installed under this name
        return None


def commit(repository: Path) -> dict[str, Any] | None:
    """Returns the `id` of the commit, whether files differ from it (`dirty`), and a checksum of the `changes` if so.

    None where the folder is no clone. The archive of a commit holds its id in the file `COMMIT`.
    """
    if not (repository / ".git").exists():
        archived = repository / "COMMIT"
        return {"id": archived.read_text().strip(), "dirty": False} if archived.exists() else None

    def git(*args: str) -> str:
        command = ["git", "-C", str(repository), *args]
        done = subprocess.run(command, capture_output=True, check=True, timeout=20)
        return done.stdout.decode(errors="replace").strip()

    try:
        found: dict[str, Any] = {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
        if found["dirty"]:
            new = git("ls-files", "--others", "--exclude-standard", "*.py").splitlines()
            texts = [git("diff", "HEAD", "--binary"), *((repository / name).read_text() for name in new)]
            found["changes"] = xxhash.xxh3_64_hexdigest("\0".join(texts).encode())
        return found
    except (OSError, ValueError, subprocess.SubprocessError):  # git is missing, or may not read the folder
        return None
