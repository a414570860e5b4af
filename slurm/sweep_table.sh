#!/usr/bin/env bash
#SBATCH --job-name=dpo-table
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:20:00
#SBATCH --output=%x-%j.log
# The last job of a sweep: table and plot. Submitted by `dpo-dist sweep ... --slurm`.
set -euo pipefail
# Slurm runs a copy of this file, so its folder is asked for.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(.*\)/sweep_table\.sh.*|\1|p')
IN_ENV=()
# shellcheck source=slurm/site.env
source "$here/site.env"
exec "${IN_ENV[@]}" python -m dpo_dist sweep "$@" --table
