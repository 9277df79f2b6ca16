"""``python -m titan_moe``: its list is whole, and a command is reached by its name."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from titan_moe.__main__ import COMMANDS, main

PACKAGE = Path(__file__).resolve().parent.parent / "titan_moe"


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", listed, re.MULTILINE) for name in COMMANDS)


def test_every_module_with_a_command_is_listed() -> None:
    """Two measurements of the bench apart, which docs/ names by their modules."""
    runnable = {
        path.relative_to(PACKAGE.parent)
        .with_suffix("")
        .as_posix()
        .replace("/", ".")
        .removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    apart = {"titan_moe", "titan_moe.trainer.train", "titan_moe.trainer.launch"}
    apart |= {"titan_moe.bench.dispatcher_traffic", "titan_moe.bench.replay"}
    assert runnable - apart == {module for module, _ in COMMANDS.values()}


def test_a_typo_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numeric", "compare"]) == 2
    assert capsys.readouterr().err == (
        "titan_moe: 'numeric' is not a command (there are: config, plan, numerics, convert, data, "
        "dispatchers, bench); did you mean 'numerics'?\n"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_exists(name: str) -> None:
    assert importlib.util.find_spec(COMMANDS[name][0]) is not None


def test_arguments_and_status_pass_through() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "titan_moe",
            "config",
            "train_configs/debug_local.toml",
            "--moe.dispatcher",
            "x",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
        env=os.environ | {"NGPU": "1"},
    )
    assert run.returncode == 2
    assert re.fullmatch(r"titan_moe: .*'x'.*\n", run.stderr)
