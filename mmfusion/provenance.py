"""What a result was made with: versions, machine, flags and the code's commit."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import mmfusion

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def environment() -> dict[str, Any]:
    """Returns as JSON `versions`, `machine`, `flags` of XLA and JAX, and `commit` (None where git says nothing)."""
    return {
        "versions": {
            "mmfusion": mmfusion.__version__,
            **{name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(("XLA_FLAGS", "JAX_"))},
        "commit": commit(Path(mmfusion.__file__).parent.parent),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # installed under another name
        return None


def commit(repository: Path) -> dict[str, Any] | None:
    """Returns the commit that is checked out and whether files differ from it, or None where it is no clone.

    An archive of one commit says in `COMMIT` of which.
    """
    if not (repository / ".git").exists():
        said = repository / "COMMIT"
        return {"id": said.read_text().strip(), "dirty": False} if said.exists() else None

    def git(*args: str) -> str:
        command = ["git", "-C", str(repository), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, or not ours to read
        return None
