#!/usr/bin/env bash
# usage: tests/run.sh [pytest arguments]      SKIP_LINT=1 leaves out ruff and the type checker
# Sets up on the first call (setup_env.sh, with the dev extra), then lints, then tests.
set -eu
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/setup_env.sh"

cd "$root" # pytest arguments are relative to the repository
set_up_python dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -z "${SKIP_LINT:-}" ]; then
    {
        "$python" -m ruff check --quiet &&
            "$python" -m ruff format --check --quiet &&
            "$python" -m pyrefly check --python-interpreter-path "$python" --summary=none
    } || die 1 "lint failed (SKIP_LINT=1 goes straight to the tests)"
fi
exec "$python" -m pytest "$@"
