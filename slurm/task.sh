#!/usr/bin/env bash
# One task of a step: tells the stage its place in the job, as every launcher does, and becomes it.
set -euo pipefail
# Here and not in dpo.sh: in the batch shell SLURM_PROCID is 0 on every node.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Rank 0 has the job's own log, the others have a file each, unless their node does not see the run
# folder: then what they say should be read all the same.
if [ "$RANK" -gt 0 ] && [ -d "$LOG_DIR" ]; then
    exec >>"$LOG_DIR/rank$(printf %04d "$RANK").log" 2>&1
fi
exec "$@"
