"""run_train.sh, run_slurm.sh, tests/run.sh, .ci/run and setup_env.sh, run for real with fakes on PATH.

The fake Python logs each call and answers as the real one would: `-m venv` makes a folder with itself in it,
pip, the config check and torchrun do what FAKE_* variables say. Nothing here imports torch or titan_moe, but
for the real torchrun of FAKE_RANKS, whose ranks are a fake titan_moe.trainer.train.
"""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["run_train.sh", "run_slurm.sh", "tests/run.sh", ".ci/run"]
SCRIPTS = [*COMMANDS, "setup_env.sh"]
DEFAULT_CONFIG = "train_configs/debug_fsdp_tp_ep.toml"

FAKE_PYTHON = r"""#!/usr/bin/env bash
log() { local IFS='|'; echo "$*" >>"$FAKE_LOG"; }
case "$1 $2" in
    */titan_moe/trainer/launch.py\ *)
        log -m titan_moe.trainer.launch "${@:2}" "OMP_NUM_THREADS=$OMP_NUM_THREADS"
        [ -z "${FAKE_RANKS:-}" ] || exec "$REAL_PYTHON" "$@"
        [ -z "${FAKE_LOSSES:-}" ] || printf '{"loss": %s}\n' $FAKE_LOSSES >"${@: -1}/metrics.jsonl"
        exit "${FAKE_TRAIN_STATUS:-0}" ;;
    "-c "*) exit "${FAKE_TOO_OLD:-0}" ;;
    "- "*pyproject.toml) # the requirements check
        case $0 in */.venv/*) has=${FAKE_VENV_HAS:-no} ;; *) has=${FAKE_HAS:-no} ;; esac
        [ "$has" = yes ] || { echo 'torch>=2.13'; exit 1; } ;;
    "- "*) exec "$REAL_PYTHON" "$@" ;; # .ci/run reads the losses
    "-m venv") log "$@"; mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        log "$@"
        sleep "${FAKE_PIP_SECONDS:-0}"
        [ -z "${FAKE_PIP_ERROR:-}" ] || { echo "ERROR: $FAKE_PIP_ERROR"; exit 1; } ;;
    "-m titan_moe.trainer.config")
        log "$@" "WORLD_SIZE=${WORLD_SIZE:-unset}" "NGPU=$NGPU" "NNODES=$NNODES"
        [ -z "${FAKE_CONFIG_ERROR:-}" ] || { echo "$FAKE_CONFIG_ERROR" >&2; exit 2; } ;;
    "-m titan_moe.plan")
        log "$@" "NGPU=$NGPU" "NNODES=$NNODES" "CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-unset}"
        exit "${FAKE_PLAN_STATUS:-0}" ;;
    *) log "$@"; [ "$2" != "${FAKE_BROKEN_MODULE:-}" ] || exit 1 ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder with a space in its name, and the fake that they find."""

    def __init__(self, tmp_path: Path) -> None:
        self.root, self.bin, self.log_file = tmp_path / "a checkout", tmp_path / "bin", tmp_path / "calls"
        for name in [*SCRIPTS, "pyproject.toml", "constraints.txt"]:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / DEFAULT_CONFIG).parent.mkdir()
        (self.root / DEFAULT_CONFIG).touch()
        self.bin.mkdir()
        for name in ["python3.11", "python3.12", "python3.13", "python3", "python"]:
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)
        self.venv, self.state = self.root / ".venv", self.root / ".venv" / "set-up-state"

    def environment(self, **variables: str) -> dict[str, str]:
        """The caller's: nothing of the test run's own but the system's PATH."""
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return {"PATH": path, "FAKE_LOG": str(self.log_file), "REAL_PYTHON": sys.executable, **variables}

    def run(
        self, *command: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """One call of a script; without a ``cwd``, from the repository."""
        return subprocess.run(
            ["bash", str(self.root / command[0]), *command[1:]],
            cwd=cwd or self.root,
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, **variables: str) -> subprocess.Popen[str]:
        """run_train.sh in the background, in a process group of its own."""
        return subprocess.Popen(
            ["bash", str(self.root / "run_train.sh")],
            env=self.environment(**variables),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def calls(self, module: str = "") -> list[list[str]]:
        """The logged calls so far, of one ``-m module``."""
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        return [call[2:] for line in lines if (call := line.split("|"))[1] == module or not module]

    def wait_for(self, module: str) -> None:
        """Returns when a call of ``-m module`` is under way."""
        until(lambda: bool(self.calls(module)))


def until(condition: Callable[[], bool]) -> None:
    """Polls; a minute is a failure."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_one_line(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """Failed as promised: that status, one line on stderr with those words, nothing on stdout."""
    assert (result.returncode, result.stdout) == (status, ""), result
    assert result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A fresh clone: no .venv."""
    return Checkout(tmp_path)


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A clone whose set-up is done, its log empty."""
    assert checkout.run("run_train.sh").returncode == 0
    checkout.log_file.unlink()
    return checkout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_syntax_is_bash(script):
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("script", COMMANDS)
def test_commands_are_executable(script):
    assert os.access(ROOT / script, os.X_OK)


# --- set-up ----------------------------------------------------------------------------------------


def test_the_first_call_sets_up_and_the_second_starts_at_once(checkout):
    first = checkout.run("run_train.sh")
    assert first.returncode == 0
    assert first.stderr.startswith("titan_moe: setting up .venv with python3.11")
    assert checkout.calls("venv") == [[str(checkout.venv)]]
    assert checkout.calls("pip") == [["install", "-c", "constraints.txt", "-e", "."]]

    second = checkout.run("run_train.sh")
    assert (second.returncode, second.stderr) == (0, "")
    assert len(checkout.calls("venv")) == len(checkout.calls("pip")) == 1
    assert len(checkout.calls("titan_moe.trainer.launch")) == 2


def test_tests_add_the_dev_extra_in_place(ready):
    assert ready.run("tests/run.sh").returncode == 0
    assert ready.calls("pip") == [["install", "-c", "constraints.txt", "-e", ".[dev]"]]
    assert ready.calls("venv") == []
    ready.run("tests/run.sh")
    ready.run("run_train.sh")
    assert len(ready.calls("pip")) == 1


@pytest.mark.parametrize("file", ["constraints.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_in_place(ready, file):
    with open(ready.root / file, "a", encoding="utf-8") as pins:
        pins.write("# moved\n")
    assert ready.run("run_train.sh").returncode == 0
    assert (len(ready.calls("venv")), len(ready.calls("pip"))) == (0, 1)


def test_a_killed_set_up_is_redone_from_scratch(checkout):
    process = checkout.start(FAKE_PIP_SECONDS="60")
    checkout.wait_for("pip")
    (checkout.venv / "half-unpacked").touch()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert checkout.state.read_text() == "unfinished\n"

    assert checkout.run("run_train.sh").returncode == 0
    assert (len(checkout.calls("venv")), len(checkout.calls("pip"))) == (2, 2)
    assert not (checkout.venv / "half-unpacked").exists()


def test_a_failed_set_up_is_one_line_and_redone(checkout):
    failed = checkout.run("run_train.sh", FAKE_PIP_ERROR="No matching distribution found for torch")
    assert failed.returncode == 1
    _, line = failed.stderr.splitlines()
    assert line.startswith("titan_moe: set-up failed: ERROR: No matching distribution found for torch (log: ")
    assert checkout.calls("titan_moe.trainer.launch") == []

    assert checkout.run("run_train.sh").returncode == 0
    assert len(checkout.calls("venv")) == 2


def test_a_moved_checkout_is_set_up_again(ready):
    ready.root.rename(ready.root.with_name("moved"))
    ready.root = ready.root.with_name("moved")
    assert ready.run("run_train.sh").returncode == 0
    assert (len(ready.calls("venv")), len(ready.calls("pip"))) == (1, 1)


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock on this machine")
def test_two_starts_at_once_set_up_once(checkout):
    first = checkout.start(FAKE_PIP_SECONDS="0.5")
    checkout.wait_for("pip")
    second = checkout.start()
    assert "another set-up of .venv is running" in second.communicate(timeout=60)[1]
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (len(checkout.calls("venv")), len(checkout.calls("pip"))) == (1, 1)


def test_a_python_with_everything_is_kept(checkout):
    assert checkout.run("run_train.sh", FAKE_HAS="yes").returncode == 0
    assert not checkout.venv.exists()
    assert checkout.calls("pip") == []


def test_an_activated_venv_of_ours_is_no_python_of_the_callers(ready):
    (ready.root / "constraints.txt").write_text("# moved\n")
    path = f"{ready.venv}/bin:{ready.environment()['PATH']}"
    assert ready.run("run_train.sh", PATH=path, FAKE_VENV_HAS="yes").returncode == 0
    assert len(ready.calls("pip")) == 1


def test_somebody_elses_venv_is_used_as_it_is(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python", checkout.venv / "bin" / "python")
    assert checkout.run("run_train.sh", FAKE_VENV_HAS="yes").returncode == 0
    assert checkout.calls("pip") == []
    assert not checkout.state.exists()


def test_somebody_elses_incomplete_venv_is_refused_and_left_alone(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python", checkout.venv / "bin" / "python")
    refused = checkout.run("run_train.sh")
    assert_one_line(refused, 1, "lacks torch>=2.13", "pip install -c constraints.txt -e '.'")
    assert [path.name for path in checkout.venv.iterdir()] == ["bin"]


def test_an_old_python_is_refused(checkout):
    assert_one_line(checkout.run("run_train.sh", FAKE_TOO_OLD="1"), 1, "needs Python 3.11 or newer")
    assert not checkout.venv.exists()


def test_a_shim_that_does_not_start_is_passed_over(checkout):
    (checkout.bin / "python3.11").write_text("#!/bin/sh\nexit 127\n")
    assert "setting up .venv with python3.12" in checkout.run("run_train.sh").stderr


@pytest.mark.parametrize(
    ("requirement", "status", "out"),
    [
        ("pytest>=7", 0, ""),
        ("pytest>=7; python_version < '3'", 0, ""),
        ("no-such-thing; python_version < '3'", 0, ""),
        ("no-such-thing", 1, "no-such-thing\n"),
        ("pytest>=7000", 1, "pytest>=7000\n"),
    ],
)
def test_requirements_are_compared_for_real(checkout, requirement, status, out):
    text = f'[project]\ndependencies = ["{requirement}"]\noptional-dependencies = {{}}\n'
    (checkout.root / "pyproject.toml").write_text(text)
    script = f'root="{checkout.root}"; source "$root/setup_env.sh"; has_requirements "{sys.executable}" base'
    checked = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (status, out)


# --- run_train.sh ----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["a.toml", "--help"]])
def test_help_sets_nothing_up(checkout, arguments):
    result = checkout.run("run_train.sh", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    for word in [
        "usage: ./run_train.sh",
        "NGPU=4",
        "LOG_RANK",
        "NNODES",
        "RDZV_ENDPOINT",
        "COMM_MODE",
        "run_slurm.sh",
        "CONFIG_FILE",
        DEFAULT_CONFIG,
    ]:
        assert word in result.stdout
    assert not checkout.venv.exists()


def test_the_call_of_torchrun(ready):
    result = ready.run("run_train.sh", "--training.steps", "3", "--dump_folder", "out of here")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    overrides = [DEFAULT_CONFIG, "--training.steps", "3", "--dump_folder", "out of here"]
    assert ready.calls("titan_moe.trainer.config") == [[*overrides, "WORLD_SIZE=unset", "NGPU=4", "NNODES=1"]]
    launch = "--nnodes 1 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    console = "--local-ranks-filter 0 --role rank --tee 3 -m titan_moe.trainer.train"
    assert ready.calls("titan_moe.trainer.launch") == [
        [*launch.split(), *console.split(), *overrides, "OMP_NUM_THREADS=1"]
    ]


def test_the_environment_reaches_torchrun(ready):
    told = {
        "NGPU": "2",
        "LOG_RANK": "0,1",
        "NNODES": "2",
        "RDZV_ENDPOINT": "host:29500",
        "OMP_NUM_THREADS": "8",
    }
    assert ready.run("run_train.sh", **told, WORLD_SIZE="2").returncode == 0
    assert ready.calls("titan_moe.trainer.config")[0][1:] == ["WORLD_SIZE=unset", "NGPU=2", "NNODES=2"]
    (call,) = ready.calls("titan_moe.trainer.launch")
    given = dict(itertools.pairwise(call))
    assert (given["--nnodes"], given["--nproc-per-node"]) == ("2", "2")
    assert (given["--rdzv-endpoint"], given["--local-ranks-filter"]) == ("host:29500", "0,1")
    assert call[-1] == "OMP_NUM_THREADS=8"


def test_the_status_of_training_is_the_scripts(ready):
    assert ready.run("run_train.sh", FAKE_TRAIN_STATUS="7").returncode == 7


def test_a_wrong_config_is_its_own_one_line_and_no_rank_starts(ready):
    line = "titan_moe: train.toml: training.stepz is not a key; did you mean 'steps'?"
    result = ready.run("run_train.sh", "--training.stepz", "3", FAKE_CONFIG_ERROR=line)
    assert_one_line(result, 2, line)
    assert ready.calls("titan_moe.trainer.launch") == []


def test_a_config_is_looked_for_here_then_in_the_repository(ready, tmp_path):
    here = tmp_path / "else where"
    (here / "train_configs").mkdir(parents=True)

    def used(*arguments: str, **variables: str) -> str:
        assert ready.run("run_train.sh", *arguments, cwd=here, **variables).returncode == 0
        call = ready.calls("titan_moe.trainer.launch")[-1]
        return call[call.index("titan_moe.trainer.train") + 1]

    in_repository = str(ready.root / DEFAULT_CONFIG)
    assert used() == in_repository
    assert used(DEFAULT_CONFIG) == in_repository
    (here / DEFAULT_CONFIG).touch()
    assert used(DEFAULT_CONFIG) == DEFAULT_CONFIG
    (here / "my own.toml").touch()
    assert used("my own.toml") == "my own.toml"
    assert used(CONFIG_FILE="my own.toml") == "my own.toml"
    assert used(DEFAULT_CONFIG, CONFIG_FILE="my own.toml") == DEFAULT_CONFIG
    assert used("--training.steps", "3", CONFIG_FILE="my own.toml") == "my own.toml"
    assert used(str(here / "my own.toml")) == str(here / "my own.toml")


# A rank does what FAKE_RANKS says, by rank: Python, where `note` is torch's @record at a given age.
FAKE_TRAIN = """
import json, os, signal, sys, time
mine = os.environ["TORCHELASTIC_ERROR_FILE"]
def note(message, seconds_ago=0):
    told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()) - seconds_ago)}}
    with open(mine + ".new", "w") as file:
        json.dump({"message": told}, file)
    os.rename(mine + ".new", mine)
def after_rank_0():
    while not os.path.exists(mine.replace("/1/error", "/0/error")):
        time.sleep(0.05)
exec(json.loads(os.environ["FAKE_RANKS"])[os.environ["RANK"]])
"""
RESET = "RuntimeError: [/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"
LOST = f"note({RESET!r}, seconds_ago=5); time.sleep(60)"
# (what rank 1 does, its last words); rank 0 lost the connection, and its clock says earlier.
CAUSES = {
    "killed": ("after_rank_0(); os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 (SIGKILL)"),
    "raised": (
        "after_rank_0(); note('ValueError: bad shard\\nand more'); sys.exit(1)",
        "failed: ValueError: bad shard",
    ),
    "exited": ("after_rank_0(); sys.exit(7)", "ended with status 7"),
    "lost": ("sys.exit(0)", ""),
}


def with_ranks(checkout: Checkout, ranks: dict[str, str]) -> dict[str, str]:
    """A titan_moe.trainer.train of two ranks under the real torchrun."""
    trainer = checkout.root / "titan_moe" / "trainer"
    trainer.mkdir(parents=True)
    (trainer / "train.py").write_text(FAKE_TRAIN)
    shutil.copy(ROOT / "titan_moe" / "trainer" / "launch.py", trainer)
    scratch = checkout.root / "tmp"
    scratch.mkdir()
    return {"NGPU": "2", "FAKE_RANKS": json.dumps(ranks), "TMPDIR": str(scratch)}


@pytest.mark.parametrize(
    "cause",
    ["killed", "raised", *(pytest.param(cause, marks=pytest.mark.slow) for cause in ("exited", "lost"))],
)
def test_the_last_line_names_the_rank_and_the_cause(ready, cause):
    does, says = CAUSES[cause]
    told = with_ranks(ready, {"0": LOST if says else f"note({RESET!r}); sys.exit(1)", "1": does})
    result = ready.run("run_train.sh", **told)
    assert result.returncode == 1
    *report, last = result.stderr.splitlines()
    rank = 1 if says else 0
    (log,) = (ready.root / "tmp").glob(f"titan_moe_*/*/attempt_0/{rank}/stderr.log")
    says = says or f"failed: {RESET}"
    assert last == f"titan_moe: rank {rank} on {socket.gethostname()} {says} (its log: {log})"
    # torchrun by itself takes the earliest clock for the cause.
    root_cause = report[report.index("Root Cause (first observed failure):") :]
    assert any(line.split() == ["rank", ":", "0", "(local_rank:", "0)"] for line in root_cause)


def test_a_run_that_ends_well_has_no_last_line(ready):
    result = ready.run("run_train.sh", **with_ranks(ready, {"0": "print('loss 7.5')", "1": ""}))
    assert result.returncode == 0
    assert "loss 7.5" in result.stdout
    assert "titan_moe:" not in result.stderr


def test_a_signal_to_the_script_reaches_the_ranks(ready, tmp_path):
    file = f"{str(tmp_path)!r} + '/pid' + os.environ['RANK']"
    wait = f"open({file}, 'w').write(str(os.getpid())); time.sleep(600)"
    process = ready.start(**with_ranks(ready, {"0": wait, "1": wait}))
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    until(lambda: all(file.exists() and file.read_text() for file in files))
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("name", ["no such.toml", "", "train_configs"])
def test_a_missing_config_is_one_line(checkout, name):
    assert_one_line(checkout.run("run_train.sh", name), 2, f"no config file '{name}'", str(checkout.root))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NGPU": "0"}, "NGPU (0) must be a positive integer"),
        ({"NGPU": "gpu"}, "NGPU (gpu) must be a positive integer"),
        ({"NNODES": "-1"}, "NNODES (-1) must be a positive integer"),
        ({"NNODES": "2"}, "set RDZV_ENDPOINT"),
        ({"COMM_MODE": "fake"}, "COMM_MODE (fake) must be fake_backend"),
    ],
)
def test_an_impossible_launch_is_one_line(checkout, variables, words):
    assert_one_line(checkout.run("run_train.sh", **variables), 2, words)


def test_the_call_of_the_plan(ready):
    told = {"COMM_MODE": "fake_backend", "NGPU": "512", "CUDA_VISIBLE_DEVICES": "0,1"}
    result = ready.run("run_train.sh", DEFAULT_CONFIG, "--memory-gib", "40", **told)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (call,) = ready.calls("titan_moe.plan")
    assert call == [DEFAULT_CONFIG, "--memory-gib", "40", "NGPU=512", "NNODES=1", "CUDA_VISIBLE_DEVICES="]
    assert ready.calls("titan_moe.trainer.config") == ready.calls("titan_moe.trainer.launch") == []


def test_a_plan_for_many_nodes_needs_none_of_them(ready):
    assert ready.run("run_train.sh", COMM_MODE="fake_backend", NNODES="64", NGPU="8").returncode == 0
    assert ready.calls("titan_moe.plan")[0][1:3] == ["NGPU=8", "NNODES=64"]


def test_the_status_of_the_plan_is_the_scripts(ready):
    assert ready.run("run_train.sh", COMM_MODE="fake_backend", FAKE_PLAN_STATUS="2").returncode == 2


# --- run_slurm.sh ----------------------------------------------------------------------------------

FAKE_SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames node[7-9]" ] || exit 1
printf 'node7\\nnode8\\nnode9\\n'
"""
# Starts the task once, where the real one starts it on each node.
FAKE_SRUN = r"""#!/usr/bin/env bash
{ IFS='|'; echo "-m|srun|$*"; } >>"$FAKE_LOG"
while [[ $1 == -* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac; done
exec "$@"
"""
JOB = {"SLURM_JOB_ID": "4012345", "SLURM_JOB_NODELIST": "node[7-9]", "SLURM_JOB_NUM_NODES": "3"}


@pytest.fixture
def cluster(ready: Checkout) -> Checkout:
    """A clone on a machine with Slurm's commands."""
    for name, text in {"scontrol": FAKE_SCONTROL, "srun": FAKE_SRUN}.items():
        (ready.bin / name).write_text(text)
        (ready.bin / name).chmod(0o755)
    return ready


def test_slurm_starts_one_task_per_node_and_each_meets_the_first(cluster):
    result = cluster.run(
        "run_slurm.sh", DEFAULT_CONFIG, "--training.steps", "3", **JOB, SLURM_GPUS_ON_NODE="4"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    (task,) = cluster.calls("srun")
    options = "--nodes 3 --ntasks 3 --ntasks-per-node 1 --kill-on-bad-exit=1 bash"
    script = str(cluster.root / "run_train.sh")
    assert task == [*options.split(), script, DEFAULT_CONFIG, "--training.steps", "3"]
    (call,) = cluster.calls("titan_moe.trainer.launch")
    given = dict(itertools.pairwise(call))
    assert (given["--nnodes"], given["--nproc-per-node"]) == ("3", "4")
    assert given["--rdzv-endpoint"] == "node7:22345"
    assert given["titan_moe.trainer.train"] == DEFAULT_CONFIG


def test_slurm_runs_from_a_copy_and_keeps_what_is_set(cluster, tmp_path):
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(cluster.root / "run_slurm.sh", spool / "slurm_script")
    told = JOB | {"NGPU": "2", "RDZV_ENDPOINT": "node8:1", "SLURM_SUBMIT_DIR": str(cluster.root)}
    copied = subprocess.run(
        ["bash", str(spool / "slurm_script")],
        cwd=cluster.root,
        env=cluster.environment(**told),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (copied.returncode, copied.stderr) == (0, "")
    given = dict(itertools.pairwise(cluster.calls("titan_moe.trainer.launch")[0]))
    assert (given["--nproc-per-node"], given["--rdzv-endpoint"]) == ("2", "node8:1")
    assert str(cluster.root / "run_train.sh") in cluster.calls("srun")[0]


def test_slurm_sets_up_once_before_any_task(checkout):
    for name, text in {"scontrol": FAKE_SCONTROL, "srun": "#!/bin/sh\nexit 0\n"}.items():
        (checkout.bin / name).write_text(text)
        (checkout.bin / name).chmod(0o755)
    assert checkout.run("run_slurm.sh", **JOB).returncode == 0
    assert len(checkout.calls("pip")) == 1


@pytest.mark.parametrize(
    ("variables", "status", "words"),
    [
        ({}, 2, "start this with sbatch --nodes N"),
        (JOB | {"SLURM_JOB_NODELIST": "node["}, 1, "cannot read SLURM_JOB_NODELIST (node[)"),
    ],
)
def test_slurm_without_a_job_is_one_line(cluster, variables, status, words):
    assert_one_line(cluster.run("run_slurm.sh", **variables), status, words)
    assert cluster.calls("srun") == []


# --- tests/run.sh and .ci/run ----------------------------------------------------------------------

LINT = [["ruff", "check"], ["ruff", "format"], ["pyrefly", "check"]]


def modules(checkout: Checkout) -> list[list[str]]:
    """What ran after the set-up: module and first argument."""
    lines = [line.split("|")[1:3] for line in checkout.log_file.read_text().splitlines()]
    return [line for line in lines if line[0] not in ("venv", "pip")]


def test_tests_lint_then_test(checkout, tmp_path):
    assert checkout.run("tests/run.sh", "-k", "a or b", cwd=tmp_path).returncode == 0
    assert modules(checkout) == [*LINT, ["pytest", "-k"]]
    assert checkout.calls("pytest") == [["-k", "a or b"]]


def test_lint_can_be_left_out(checkout):
    assert checkout.run("tests/run.sh", SKIP_LINT="1").returncode == 0
    assert modules(checkout) == [["pytest"]]


@pytest.mark.parametrize("module", ["ruff", "pyrefly"])
def test_failed_lint_stops(checkout, module):
    failed = checkout.run("tests/run.sh", FAKE_BROKEN_MODULE=module)
    assert failed.returncode == 1
    assert failed.stderr.endswith("titan_moe: lint failed (SKIP_LINT=1 goes straight to the tests)\n")
    assert checkout.calls("pytest") == []


def test_ci_tests_then_trains(checkout):
    result = checkout.run(".ci/run", FAKE_LOSSES="7.5 7.25 7.0", CI="true")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "the main job trains: loss 7.5000 -> 7.0000 in 3 steps\n"
    assert [call[0] for call in modules(checkout)] == [
        "ruff",
        "ruff",
        "pyrefly",
        "pytest",
        "titan_moe.trainer.config",
        "titan_moe.trainer.launch",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"FAKE_BROKEN_MODULE": "pytest", "FAKE_LOSSES": "3 2 1"},
        {"FAKE_TRAIN_STATUS": "1", "FAKE_LOSSES": "3 2 1"},
        {"FAKE_LOSSES": "1 2 3"},
        {"FAKE_LOSSES": "3 2 NaN"},
        {"FAKE_LOSSES": "3 2 -Infinity"},
        {"FAKE_LOSSES": "3 2"},
        {},  # no metrics.jsonl at all
    ],
    ids=[
        "tests fail",
        "training fails",
        "loss rises",
        "loss is NaN",
        "loss is infinite",
        "a step is missing",
        "no metrics",
    ],
)
def test_ci_fails(checkout, wrong):
    assert checkout.run(".ci/run", **wrong).returncode != 0
