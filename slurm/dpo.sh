#!/usr/bin/env bash
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
#   sbatch slurm/dpo.sh run.yaml [section.key=value ...]
#
# All stages in one allocation, one task a GPU. Options of sbatch go before the script and win over
# the lines above. Five minutes before the end, or at a preemption, every rank is told to write a
# checkpoint; the job then puts itself back into the queue and goes on where it was.
set -euo pipefail
refuse() {
    echo "dpo.sh: $1; expected $2" >&2
    exit 2
}
usage="sbatch [options of sbatch] slurm/dpo.sh run.yaml [section.key=value ...]"
[ $# -gt 0 ] || refuse "no run config" "$usage"
for argument; do
    [[ $argument != -* ]] || refuse "$argument behind the script" "$usage"
done
every="doctor prepare reference train export verify push"
for stage in ${DPO_STAGES:-}; do
    [[ " $every " == *" $stage "* ]] || refuse "DPO_STAGES has $stage" "some of $every"
done
# In an array one job has the array's own id: by that, all of them would be signaled or requeued.
job=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# Slurm runs a copy of this file, so its folder is asked for.
here=$(scontrol show job "$job" | sed -n 's|^ *Command=\(.*\)/dpo\.sh.*|\1|p')
IN_ENV=() SRUN_OPTIONS=()
unset MASTER_ADDR      # of an allocation that this was submitted from
unset SLURM_EXPORT_ENV # a site's or --export's NONE, by which tasks would not get what this exports
: "${SLURM_NTASKS:=$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}" # not every site's sbatch sets it
# shellcheck source=slurm/site.env
source "${DPO_DIST_SITE:-$here/site.env}"
if [ -n "${DPO_SWEEP:-}" ]; then # a point of a sweep: its overrides, one a line
    mapfile -t point <"$DPO_SWEEP/$SLURM_ARRAY_TASK_ID"
    set -- "$@" "${point[@]}"
fi
attempt() { "${IN_ENV[@]}" python "$here/../launch/attempt.py" "$@"; }

# Quoted, or a node list such as node[1-2] becomes the files that match it.
DPO_DIST_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
# This shell runs on the first node, where rank 0 will be.
MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
export DPO_DIST_NODES MASTER_ADDR

stopping=0
# --signal=B: reaches this shell only; scancel passes it on to every task on every node.
trap 'stopping=1; scancel --signal=USR2 "$job" || true' USR2 TERM
requeue() {
    echo "dpo.sh: job $job goes back into the queue at $stage"
    scontrol requeue "$job"
    exit
}
# What passes (75), as a file server that starts again, is worth being queued, though not for ever.
give_up() {
    code=$?
    [ "$code" != 75 ] || [ "${SLURM_RESTART_COUNT:-0}" -ge 50 ] || requeue
    exit "$code"
}

number=0 cpus=${SLURM_CPUS_PER_TASK:-1} again=0
for stage in ${DPO_STAGES:-$every}; do
    while :; do
        [ "$stopping" = 0 ] || requeue
        number=$((number + 1))
        # Jobs that share a node must not share a port, nor steps that follow each other.
        export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + number) % 20000))
        plan=$(DPO_DIST_AGAIN=$again attempt begin "$stage" "$@") || give_up
        read -r tasks LOG_DIR <<<"$plan"
        [ "$tasks" != skip ] || break
        export LOG_DIR
        # srun does not inherit --cpus-per-task; a stage of one task has the whole node.
        size=(--ntasks="$SLURM_NTASKS" --cpus-per-task="$cpus")
        [ "$tasks" = all ] ||
            size=(--nodes=1 --ntasks=1 --cpus-per-task=$((cpus * SLURM_NTASKS / SLURM_NNODES)))
        # A step whose rank dies must end as a whole, within the minute.
        srun "${SRUN_OPTIONS[@]}" "${size[@]}" --kill-on-bad-exit=1 --wait=60 \
            "$here/task.sh" "${IN_ENV[@]}" python -m dpo_dist "$stage" "$@" &
        step=$!
        # A signal interrupts `wait`, and the step goes on.
        while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
        verdict=$(attempt judge "$stage" "$@") || give_up
        [ "$verdict" != next ] || break
        [ "$verdict" = again ] || requeue # it was told to stop: the allocation ends
        again=1
        echo "dpo.sh: $stage starts again in job $job"
    done
done
