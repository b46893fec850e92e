#!/usr/bin/env bash
# One ablation over several single-host TPU VMs that share a bucket or a folder; each takes its share of the plan.
#   ZONE=us-central2-b experiments/launch/tpu.sh [--dry-run] "vm-0 vm-1 vm-2" --config=configs/easy_vqa.py --fusions=all \
#     --seeds=6 --workdir=gs://BUCKET/DIR
# The VMs have the repository at ~/mmfusion with its requirements, jax[tpu] and gcsfs; a VM that was preempted is started
# again by the same line.
set -euo pipefail

run=()
if [ "${1:-}" = "--dry-run" ]; then
  run=(echo)
  shift
fi
if [ "$#" -lt 2 ] || [ -z "${ZONE:-}" ]; then
  echo 'usage: ZONE=... tpu.sh [--dry-run] "VM VM ..." FLAG ...' >&2
  exit 2
fi
read -ra vms <<<"$1"
shift
for i in "${!vms[@]}"; do
  printf -v line '%q ' python3 -m experiments.ablate "--shard=$i/${#vms[@]}" "$@"
  "${run[@]}" gcloud compute tpus tpu-vm ssh "${vms[$i]}" --zone="$ZONE" \
    --command="cd mmfusion && nohup $line>ablation-$i.log 2>&1 &"
done
