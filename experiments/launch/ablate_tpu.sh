#!/usr/bin/env bash
# Runs one ablation on several single-host TPU VMs that share a bucket or a folder: each runs its share of the plan.
#   ZONE=us-central2-b experiments/launch/ablate_tpu.sh [--dry-run] "vm-0 vm-1 vm-2" --config=configs/easy_vqa.py --fusions=all \
#     --seeds=6 --workdir=gs://BUCKET/DIR
# Each VM needs the repository at ~/mmfusion with its requirements, jax[tpu] and gcsfs. After a preemption, run the same
# command again.
set -euo pipefail

run=()
if [ "${1:-}" = "--dry-run" ]; then
  run=(echo)
  shift
fi
if [ "$#" -lt 2 ] || [ -z "${ZONE:-}" ]; then
  echo 'usage: ZONE=... ablate_tpu.sh [--dry-run] "VM VM ..." FLAG ...' >&2
  exit 2
fi
read -ra vms <<<"$1"
shift
for i in "${!vms[@]}"; do
  printf -v line '%q ' python3 -m experiments.ablate "--shard=$i/${#vms[@]}" "$@"
  "${run[@]}" gcloud compute tpus tpu-vm ssh "${vms[$i]}" --zone="$ZONE" \
    --command="cd mmfusion && nohup $line>ablation-$i.log 2>&1 &"
done
