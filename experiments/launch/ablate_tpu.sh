#!/usr/bin/env bash
# Runs one ablation on several single-host TPU VMs that share a bucket: each takes the next trial that no other holds.
#   ZONE=us-east5-b TYPE=ct6e-standard-1t experiments/launch/ablate_tpu.sh [--dry-run] "vm-0 vm-1 vm-2" \
#     --config=configs/easy_vqa.py --fusions=all --seeds=6 --workdir=gs://BUCKET/DIR
# `train_tpu.sh create` and `setup` make each VM, with the same ZONE, TYPE and PROJECT, and its `delete` ends what they
# cost. After a preemption, run the same command again.
set -euo pipefail

refuse() {
  echo "ablate_tpu.sh: $*" >&2
  exit 2
}

run=()
if [ "${1:-}" = "--dry-run" ]; then
  run=(--dry-run)
  shift
fi
if [ "$#" -lt 2 ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ]; then
  echo 'usage: ZONE=... TYPE=... ablate_tpu.sh [--dry-run] "VM VM ..." FLAG ...' >&2
  exit 2
fi
[[ "$1" =~ ^[a-z][a-z0-9-]*(\ [a-z][a-z0-9-]*)*$ ]] || refuse "${1@Q}: expected names of VMs with a space between them"
read -ra vms <<< "$1"
shift
for vm in "${vms[@]}"; do
  "$(dirname "${BASH_SOURCE[0]}")/train_tpu.sh" "${run[@]}" ablate "$vm" "$@"
done
