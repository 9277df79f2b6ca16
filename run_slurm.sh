#!/usr/bin/env bash
#SBATCH --job-name titan_moe
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
# usage: sbatch --nodes 32 run_slurm.sh CONFIG.toml [--section.key value ...]
#
# From the repository, on a file system that all nodes share. One run_train.sh per node, which starts a rank
# per GPU of the node (NGPU, else what Slurm gave). Partition, account and time: sbatch flags of your site.
set -eu
# sbatch runs a copy of this script from its spool folder: the repository is where it was submitted.
for root in "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)" "${SLURM_SUBMIT_DIR:-}"; do
    [ ! -f "$root/setup_env.sh" ] || break
done
[ -f "$root/setup_env.sh" ] || {
    echo "titan_moe: no setup_env.sh in SLURM_SUBMIT_DIR (${SLURM_SUBMIT_DIR:-not set}): sbatch from the repository" >&2
    exit 2
}
source "$root/setup_env.sh"

[ -n "${SLURM_JOB_NODELIST:-}" ] ||
    die 2 "SLURM_JOB_NODELIST is not set: start this with sbatch --nodes N run_slurm.sh CONFIG.toml, or use run_train.sh"
export NNODES=$SLURM_JOB_NUM_NODES NGPU=${NGPU:-${SLURM_GPUS_ON_NODE:-8}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || die 1 "scontrol cannot read SLURM_JOB_NODELIST ($SLURM_JOB_NODELIST)"
# Two jobs that share the first node must not share its port.
export RDZV_ENDPOINT="${RDZV_ENDPOINT:-${head%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))}"

# Once, here: as many pips as nodes would meet in one .venv.
set_up_python base

exec srun --nodes "$NNODES" --ntasks "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash "$root/run_train.sh" "$@"
