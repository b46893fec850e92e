#!/usr/bin/env bash
# Runs one ablation as a Slurm array: each task runs its share of the plan, and the last one writes the report.
#   sbatch --array=0-7 experiments/launch/ablate_slurm.sh --config=configs/easy_vqa.py --fusions=all --seeds=6 --workdir=/shared/DIR
#SBATCH --job-name=mmfusion-ablation
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -uo pipefail

python -m experiments.ablate --shard="$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT" "$@" &
ablation=$!
trap 'kill -TERM "$ablation"' TERM  # Slurm warns this shell; running trials save a checkpoint
wait "$ablation" # also returns when the signal arrives
wait "$ablation"
status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$status"
