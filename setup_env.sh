# shellcheck shell=bash
# Sourced by run_train.sh, tests/run.sh and .ci/run, which set $root. `set_up_python base|dev` leaves in
# $python an interpreter that has what pyproject.toml requires, for dev its dev extra as well.
#   1. The caller's own `python` (conda, a container, an activated venv), when it has everything.
#   2. Otherwise $root/.venv, made from constraints.txt with `python -m venv` and pip, nothing else.

: "${root:?is set by the script that sources this one}"

# bash -e must not turn a failing step into silence: each one ends here, in one line.
die() { # STATUS MESSAGE
    echo "titan_moe: $2" >&2
    exit "$1"
}

# Prints the first requirement that PYTHON lacks and fails; reads metadata only, so it takes 0.1 s.
has_requirements() { # PYTHON base|dev
    "$1" - "$root/pyproject.toml" "$2" 2>&1 <<'PY'
import sys

if sys.version_info < (3, 11):
    sys.exit("python>=3.11")
import tomllib
from importlib.metadata import PackageNotFoundError, version

try:
    from packaging.requirements import Requirement
    from packaging.version import Version
except ImportError:
    sys.exit("packaging")

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
for line in project["dependencies"] + project["optional-dependencies"].get(sys.argv[2], []):
    wanted = Requirement(line)
    if wanted.marker and not wanted.marker.evaluate():
        continue
    try:
        # base_version: a source build such as 2.13.0a0+git1234 is a 2.13 to us.
        if not wanted.specifier.contains(Version(version(wanted.name)).base_version):
            sys.exit(line)
    except PackageNotFoundError:
        sys.exit(line)
PY
}

# Runs each candidate: a pyenv shim is on PATH without being a Python that starts.
choose_python() {
    local candidate
    # 3.11 first: the tested version, and the one that a CPU wheel of torch may lie on disk for.
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

up_to_date() { # base|dev
    local made_at made_from made_with
    reusable=""
    [ -x "$venv/bin/python" ] && [ -f "$state" ] || return 1
    { IFS= read -r made_at && read -r made_from made_with; } <"$state" || return 1 # or unfinished: one line
    # pip's scripts hold absolute paths: a checkout that was moved or copied starts over.
    [ "$made_at" = "$root" ] || return 1
    # What was finished here can be brought up to date in place.
    reusable=yes
    [ "$made_from" = "$pins" ] && { [ "$made_with" = dev ] || [ "$1" = base ]; }
}

make_venv() { # base|dev
    local base lacks log=$venv/set-up.log what=.
    [ "$1" = base ] || what=.[$1]
    if [ -e "$venv/bin" ] && [ ! -e "$state" ]; then # somebody's own: use it or say why not, never delete it
        lacks=$(has_requirements "$venv/bin/python" "$1") && return
        die 1 ".venv is not from this script and lacks ${lacks##*$'\n'}: delete it, or .venv/bin/python -m pip install -c constraints.txt -e '$what'"
    fi
    base=$(choose_python) || die 1 "needs Python 3.11 or newer; none of python3.11 python3.12 python3.13 python3 python is"
    echo "titan_moe: setting up .venv with $base, once, 1-3 minutes (log: $log)" >&2
    { mkdir -p "$venv" && echo unfinished >"$state" && : >"$log"; } || die 1 "cannot write $venv"
    if [ -z "$reusable" ]; then
        # Not venv --clear: the mark must outlive a kill.
        find "$venv" -mindepth 1 ! -name "${state##*/}" ! -name "${log##*/}" -delete
        "$base" -m venv "$venv" >>"$log" 2>&1 || die 1 "set-up failed: $base -m venv: $(tail -n 1 "$log")"
    fi
    (cd "$root" && "$venv/bin/python" -m pip install -c constraints.txt -e "$what") >>"$log" 2>&1 ||
        die 1 "set-up failed: $({ grep ERROR "$log" || tail "$log"; } | tail -n 1) (log: $log)"
    printf '%s\n' "$root" "$pins $1" >"$state"
}

set_up_python() { # base|dev
    venv=$root/.venv
    state=$venv/set-up-state # "unfinished", or where and from what it was finished
    pins=$(cat "$root/constraints.txt" "$root/pyproject.toml" | cksum | tr ' ' -)
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # this checkout, whichever titan_moe is installed
    python=$(command -v python || true)
    if [ -n "$python" ] && ! [ "$(dirname "$python")" -ef "$venv/bin" ]; then
        has_requirements "$python" "$1" >/dev/null && return
    fi
    python=$venv/bin/python
    # One set-up at a time. Children inherit the lock: a killed script's pip is waited for as well.
    exec 9<"$root/pyproject.toml"
    if command -v flock >/dev/null && ! flock -n 9; then
        echo "titan_moe: another set-up of .venv is running; waiting for it" >&2
        flock 9
    fi
    up_to_date "$1" || make_venv "$1"
    exec 9<&-
}
