#!/usr/bin/env bash
# One task of a step: tells the stage its place in the job, as every launcher does, and runs it.
set -euo pipefail
# Here and not in dpo.sh: in the batch shell SLURM_PROCID is 0 on every node.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Rank 0 has the job's own log, the others have a file each, unless their node does not see the run
# folder: then what they say should be read all the same.
name=$LOG_DIR/rank$(printf %04d "$RANK")
if [ "$RANK" -gt 0 ] && [ -d "$LOG_DIR" ]; then
    exec >>"$name.log" 2>&1
fi
# Not `exec`: of a rank that a signal kills only its parent can tell, and srun's code is 143 for any.
# Slurm signals every process of a step, and these are the rank's to answer. They are ignored here,
# not trapped: a trap that runs while the rank ends makes bash lose its exit code now and then.
trap '' INT QUIT TERM USR2
(
    trap - INT QUIT TERM USR2
    exec "$@"
) &
code=0
wait $! || code=$?
# by 15 Slurm ends the others when one has failed
if [ "$code" -gt 128 ] && [ "$code" != 143 ] && [ -d "$LOG_DIR" ]; then
    note='{"signal": %d, "exit_code": %d, "restartable": true}\n'
    # shellcheck disable=SC2059
    printf "$note" $((code - 128)) "$code" >"$name.failed.json"
fi
exit "$code"
