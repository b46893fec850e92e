#!/usr/bin/env bash
# Runs the suite with the newest packages that pyproject.toml allows, for each Python given:
# tests/versions.sh python3.12 python3.13
set -euo pipefail
cd "$(dirname "$0")/.."
for python in "$@"; do
  environment=$(mktemp -d)
  trap 'rm -rf "$environment"' EXIT
  "$python" -m venv "$environment"
  "$environment/bin/pip" install --quiet --disable-pip-version-check '.[dev]'
  "$environment/bin/pip" uninstall --quiet --yes mmfusion # the tests import the checkout
  "$environment/bin/python" -c '
import importlib.metadata, platform
names = "jax jaxlib flax optax orbax-checkpoint grain numpy scipy tensorflow-datasets"
print("Python", platform.python_version(), *(f"{n} {importlib.metadata.version(n)}" for n in names.split()))'
  "$environment/bin/python" -m pytest
  rm -rf "$environment" build
done
