#!/usr/bin/env bash
# Runs one ablation as a Slurm array: each task takes the next trial that no other holds, until all have ended.
#   sbatch --array=0-31%8 experiments/launch/ablate_slurm.sh [--dry-run] --config=configs/easy_vqa.py --fusions=all --seeds=6 \
#     --workdir=/shared/DIR
# %8: at most eight tasks run at once; what is left for the later ones is what these did not finish in their time.
#SBATCH --job-name=mmfusion-ablation
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -uo pipefail

refuse() {
  echo "ablate_slurm.sh: $*" >&2
  exit 2
}

dry=""
if [ "${1:-}" = "--dry-run" ]; then
  dry=1
  shift
fi
if [ "$#" -eq 0 ]; then
  echo 'usage: sbatch --array=0-31%8 ablate_slurm.sh [--dry-run] FLAG ...' >&2
  exit 2
fi
if [ -z "$dry" ] && [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  refuse "not a task of an array: submit it with sbatch --array=0-31%8"
fi

command=(python -m experiments.ablate "$@")
if [ -n "$dry" ]; then
  printf -v line '%q ' "${command[@]}"
  echo "${line% }"
  echo "# after exit status 75, at most 100 times: scontrol requeue JOB_TASK"
  exit 0
fi
"${command[@]}" &
ablation=$!
trap 'kill -TERM "$ablation"' TERM # Slurm warns this shell; running trials save a checkpoint
wait "$ablation" # also returns when the signal arrives
wait "$ablation"
status=$?
if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
