#!/usr/bin/env bash
# Slurm: one model at several budgets, each a job of an array on a GPU of its own.
#
#   sbatch --array 0-3 examples/cluster/slurm-sweep.sh MODEL OUT --data texts/
#
# Writes OUT/75%, OUT/50%, OUT/33% and OUT/25%; BUDGETS="--bytes=25% --bytes=12.5%" has others. What follows OUT is for
# `latentize convert`. Afterwards `latentize compare MODEL OUT/*` has all of them in one table.
#SBATCH --job-name latentize-sweep
#SBATCH --gpus 1
#SBATCH --cpus-per-task 8
#SBATCH --time 04:00:00
#SBATCH --requeue
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
read -ra BUDGETS <<<"${BUDGETS:---keep=75% --keep=50% --keep=33% --keep=25%}"
MODEL=$1 OUT=$2 BUDGET=${BUDGETS[$SLURM_ARRAY_TASK_ID]}
shift 2
mkdir -p "$OUT"
latentize convert "$MODEL" "$OUT/${BUDGET#*=}" "${BUDGET%%=*}" "${BUDGET#*=}" "$@" --device "${DEVICE:-cuda}" --resume
