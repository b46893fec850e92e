#!/usr/bin/env bash
# One training run over the nodes of a Slurm job, a process a GPU (JAX takes one each); see README.md beside this file.
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 experiments/tpu/slurm.sh [--dry-run] --config=configs/X.py \
#     --workdir=/shared/DIR
#SBATCH --job-name=mmfusion
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -uo pipefail

command=(srun --kill-on-bad-exit=1 python -m experiments.train --distributed=auto)
if [ "${1:-}" = "--dry-run" ]; then
  shift
  echo "${command[@]}" "$@"
  echo "scontrol requeue JOB # after exit 75, 134, 137 or 143, a hundred times at most"
  exit 0
fi
if [ "$#" -eq 0 ]; then
  echo 'usage: sbatch --nodes=N slurm.sh [--dry-run] FLAG ...' >&2
  exit 2
fi
"${command[@]}" "$@" # Slurm's warning goes to every process, and all save themselves at one step
status=$?
case "$status" in
  # 134, 137: a host was lost, without which the others cannot go on, or killed; 143: stopped before it could hear of it
  75 | 134 | 137 | 143)
    if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
