#!/usr/bin/env bash
# Measures one GPU (or TPU) in under eight minutes: gpu.sh [FLAG ...], flags of `python -m experiments.benchmark.gpu`.
# It needs JAX for the accelerator. Packages that a plain JAX image lacks are taken from build/gpu_packages.tar.gz
# (23 MB), which `gpu.sh pack` makes where there is a package index and the same Python; carry it to the machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
packages=build/gpu_packages

if [[ "${1:-}" == pack ]]; then
  rm -rf "$packages"
  # jax, numpy and scipy are in the image, with the accelerator's libraries.
  python3 -m pip install --quiet --target "$packages" --no-deps absl-py etils flax fsspec immutabledict importlib_resources \
    ml-collections msgpack optax pillow promise protobuf PyYAML requests rich safetensors simplejson six soundfile cffi \
    tensorflow-datasets tensorflow-metadata tokenizers toml tqdm typing_extensions wrapt xxhash pygments markdown-it-py \
    mdurl charset-normalizer idna urllib3 certifi filelock dm-tree attrs psutil pycparser
  find "$packages" -name __pycache__ -prune -exec rm -r {} +
  tar czf "$packages.tar.gz" -C build gpu_packages
  ls -l "$packages.tar.gz"
  exit
fi

if ! python3 -c 'import mmfusion.training.setup' 2>/dev/null; then
  [[ -d "$packages" || ! -f "$packages.tar.gz" ]] || tar xzf "$packages.tar.gz" -C build
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
if [[ -n "${JAX_PLATFORMS:-}" && "$JAX_PLATFORMS" != *cpu* ]]; then
  export JAX_PLATFORMS="$JAX_PLATFORMS,cpu" # a step's losses are compared with the CPU's
fi
output=${OUT:-build}
mkdir -p "$output"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # so that the peak memory is what was used
exec timeout 470 python3 -m experiments.benchmark.gpu --output="$output/BENCHMARK_GPU.json" "$@"
