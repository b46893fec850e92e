"""What a result was made with: versions, machine, flags and the code's commit."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from mmfusion.version import __version__

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_")  # what names of variables begin with
PACKAGES = (  # that numbers may depend on
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "tensorflow-datasets", "pillow",
    "soundfile", "tokenizers", "safetensors", "ml-collections",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Returns as JSON `versions`, `machine`, `flags` of XLA and JAX, and `commit` (None where git says nothing)."""
    return {
        "versions": {
            "mmfusion": __version__,
            **{name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)},
        "commit": commit(Path(__file__).parents[2]),
    }


def code(made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Returns of `environment()` what numbers may depend on: versions of the packages and the code's commit."""
    return {"versions": made_with["versions"], "commit": made_with["commit"]}


def changes(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """Returns in words what differs between two answers of `code`; "": nothing, or nothing is known of before."""
    if before is None:
        return ""
    told = [
        f"{package} was {before['versions'].get(package)} and is {version}"
        for package, version in now["versions"].items()
        if version != before["versions"].get(package)
    ]
    commits = [
        commit and commit["id"][:12] + (f" with changes ({commit['changes']})" if commit["dirty"] else "")
        for commit in (before["commit"], now["commit"])
    ]
    if commits[0] != commits[1]:
        told.append(f"the code was of commit {commits[0]} and is of {commits[1]}")
    return ", ".join(told)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name
        return None


def commit(repository: Path) -> dict[str, Any] | None:
    """Returns the commit that is checked out, whether files differ from it, and a checksum of the `changes` if so.

    None where it is no clone. An archive of one commit says in `COMMIT` of which.
    """
    if not (repository / ".git").exists():
        said = repository / "COMMIT"
        return {"id": said.read_text().strip(), "dirty": False} if said.exists() else None

    def git(*args: str) -> str:
        command = ["git", "-C", str(repository), *args]
        done = subprocess.run(command, capture_output=True, check=True, timeout=20)
        return done.stdout.decode(errors="replace").strip()

    try:
        found = {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
        if found["dirty"]:  # two states of one commit are told apart
            new = git("ls-files", "--others", "--exclude-standard", "*.py").splitlines()
            texts = [git("diff", "HEAD", "--binary"), *((repository / name).read_text() for name in new)]
            found["changes"] = xxhash.xxh3_64_hexdigest("\0".join(texts).encode())
        return found
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, or not ours to read
        return None
