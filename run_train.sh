#!/usr/bin/env bash
# Sets up on the first call (setup_env.sh), checks the config, then trains under torchrun; or plans.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/setup_env.sh"

usage() {
    cat <<'TEXT'
usage: ./run_train.sh [CONFIG.toml] [--section.key value ...]

  CONFIG.toml          relative to the current directory, else to the repository
                       (default: $CONFIG_FILE, else train_configs/debug_fsdp_tp_ep.toml)
  --section.key value  overrides the file, for example --training.steps 20 --moe.dispatcher local

environment
  NGPU=4               ranks on this node, on CPU as on GPU
  LOG_RANK=0           ranks that the console shows, for example 0,3
  NNODES=1             nodes; with more than one, every node runs the same command and
  RDZV_ENDPOINT        is host:port of one of them; under Slurm: sbatch --nodes 32 run_slurm.sh CONFIG.toml
  COMM_MODE            fake_backend: nothing runs; prints what each of NGPU * NNODES ranks will hold and
                       send, for example COMM_MODE=fake_backend NGPU=512 (docs/scale.md)

exit status: 2 for a wrong call or config (one line says why), else torchrun's. A rank that fails or is
killed ends the job; the last line names it, the cause and its log. The same command then continues from
the last checkpoint (--checkpoint.enable).
TEXT
}

for argument in "$@"; do
    if [ "$argument" = --help ] || [ "$argument" = -h ]; then
        usage
        exit 0
    fi
done
config=${CONFIG_FILE:-train_configs/debug_fsdp_tp_ep.toml}
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    config=$1
    shift
fi
[ -f "$config" ] || { [ -f "$root/$config" ] && config=$root/$config; } ||
    die 2 "no config file '$config' in $PWD or $root"

export NGPU=${NGPU:-4} NNODES=${NNODES:-1}
for name in NGPU NNODES; do
    case ${!name} in *[!0-9]* | 0*) die 2 "$name (${!name}) must be a positive integer" ;; esac
done
case ${COMM_MODE:-} in
    "" | fake_backend) ;;
    *) die 2 "COMM_MODE ($COMM_MODE) must be fake_backend, which prints a plan, or not set, which trains" ;;
esac
if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}${COMM_MODE:-}" ]; then
    die 2 "NNODES ($NNODES) is more than one: set RDZV_ENDPOINT to host:port of one node, the same on all"
fi

set_up_python base

export PYTHONSAFEPATH=1 # a titan_moe or a random.py in the current directory is not ours
unset WORLD_SIZE        # some job launchers count nodes with it; torchrun sets it for its ranks
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # CPU ranks share the cores
if [ -e /dev/nvidiactl ] && [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    # The rows an expert gets change every step; growing segments keep that from fragmenting memory.
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi

if [ "${COMM_MODE:-}" = fake_backend ]; then
    export CUDA_VISIBLE_DEVICES="" # the plan is the same with and without GPUs here
    exec "$python" -m titan_moe.plan "$config" "$@"
fi

# A wrong config is one line and status 2, before any rank starts.
"$python" -m titan_moe.trainer.config "$config" "$@" || exit $?

# torchrun, and one line at the end that says which rank failed.
exec "$python" "$root/titan_moe/trainer/launch.py" \
    --nnodes "$NNODES" --nproc-per-node "$NGPU" \
    --rdzv-backend c10d --rdzv-endpoint "${RDZV_ENDPOINT:-localhost:0}" \
    --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 \
    -m titan_moe.trainer.train "$config" "$@"
