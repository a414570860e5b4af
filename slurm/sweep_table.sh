#!/usr/bin/env bash
#SBATCH --job-name=dpo-table
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.log
# The last job of a sweep: table and plot. Submitted by `dpo-dist sweep ... --slurm`.
set -euo pipefail
for argument; do
    [[ $argument != -* || $argument == --train-only ]] || {
        echo "sweep_table.sh: $argument; expected RUN.YAML, SECTION.KEY=VALUE and --train-only" >&2
        exit 2
    }
done
# Slurm runs a copy of this file, so its folder is asked for.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/sweep_table\.sh.*|\1|p')
IN_ENV=()
# shellcheck source=slurm/site.env
source "${DPO_DIST_SITE:-$here/site.env}"
exec "${IN_ENV[@]}" python -m dpo_dist sweep "$@" --table
