#!/usr/bin/env bash
# Slurm: one conversion on every GPU of the nodes that are asked for.
#
#   sbatch --nodes 1 examples/cluster/slurm.sh MODEL OUT --keep 50% --data texts/
#
# What follows OUT is for `latentize convert`. MODEL, OUT and the text lie where all nodes see them. A job that ends
# before its time goes on when it is submitted again: --resume does nothing to what has not begun.
#SBATCH --job-name latentize
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 04:00:00
#SBATCH --requeue
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# One torchrun a node, which starts a process for each of its GPUs.
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${GPUS:-8}" --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d --rdzv_endpoint "$FIRST:${PORT:-29500}" \
  -m latentize convert "$@" --device cuda --resume
