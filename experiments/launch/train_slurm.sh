#!/usr/bin/env bash
# Runs one training run on the nodes of a Slurm job, one process per GPU; see README.md in this folder.
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 experiments/launch/train_slurm.sh [--dry-run] --config=configs/X.py \
#     --workdir=/shared/DIR
#SBATCH --job-name=mmfusion
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -uo pipefail

command=(srun --kill-on-bad-exit=1 python -m experiments.train --distributed=auto)
if [ "${1:-}" = "--dry-run" ]; then
  shift
  printf -v line '%q ' "${command[@]}" "$@"
  echo "${line% }"
  echo "# after exit status 75, 134, 137 or 143, at most 100 times: scontrol requeue JOB"
  exit 0
fi
if [ "$#" -eq 0 ]; then
  echo 'usage: sbatch --nodes=N train_slurm.sh [--dry-run] FLAG ...' >&2
  exit 2
fi
"${command[@]}" "$@" # Slurm warns every process, and all save a checkpoint at the same step
status=$?
case "$status" in
  # 134, 137: a host was lost or killed, and the others cannot continue; 143: stopped before the signal handler was set
  75 | 134 | 137 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
