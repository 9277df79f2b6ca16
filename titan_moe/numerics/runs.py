"""Starts the runs that are compared, under torchrun, all from the seed of their configuration."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from titan_moe.numerics.load import Captured

STOCK = "--model.moe=torchtitan"


class RunError(RuntimeError):
    """A run that did not finish; names its log."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a configuration, on a number of ranks."""

    config: Path
    ranks: int
    overrides: tuple[str, ...]

    @classmethod
    def of(cls, text: str, *, folder: Path = Path()) -> "Side":
        """``CONFIG.toml[@RANKS] [--section.key=value ...]``; without RANKS, as many as NGPU says, else 4."""
        try:
            config, *overrides = [text] if (folder / text).is_file() else shlex.split(text) or [""]
        except ValueError as error:
            raise RunError(f"{text}: {error}") from None
        name, at, ranks = config.rpartition("@")
        if not at or (folder / config).is_file():
            name, ranks = config, ""
        path = folder / name
        given = ranks or os.environ.get("NGPU", "4")
        if not given.isdecimal() or int(given) == 0:
            raise RunError(f"{text}: the number of ranks ({given}) must be a positive integer")
        if not path.is_file():
            raise RunError(f"{path}: no such file")
        return cls(path, int(given), tuple(overrides))

    def but(self, *overrides: str, ranks: int | None = None) -> "Side":
        """With further overrides, which win."""
        return replace(self, overrides=(*self.overrides, *overrides), ranks=ranks or self.ranks)


class Runs:
    """Captured runs in one folder; each is made once.

    Runs of one model and one seed start from equal weights on every mesh (``parallel/initialization.py``).
    """

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        overrides: list[str],
        progress: Callable[[str], None],
        timeout_s: float,
    ) -> None:
        """``overrides`` go to every run; ``progress`` is told a line now and then."""
        self.folder, self.steps, self.overrides, self.progress = folder, steps, overrides, progress
        self.timeout_s = timeout_s
        self._made: dict[tuple[str, Side], Captured | RunError] = {}

    def captured(self, name: str, side: Side, *further: str) -> Captured:
        """The run of ``side``, made under ``name`` unless it is there already. Raises RunError."""
        key = (name, side.but(*further))
        if key not in self._made:
            captured = side.but(
                *self.overrides, "--numerics.capture", "--checkpoint.interval=1000000", *further
            )
            try:
                self._made[key] = Captured(self._run(name, captured))
            except RunError as error:
                self._made[key] = error
        made = self._made[key]
        if isinstance(made, RunError):
            raise made
        return made

    def _run(self, name: str, side: Side) -> Path:
        """Runs to the end; returns the dump folder. Raises RunError with the log's last words."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        log, metrics = folder / "log.txt", folder / "metrics.jsonl"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={side.ranks}", "-m", "titan_moe.trainer.train", str(side.config)),
            *(f"--dump_folder={folder}", f"--training.steps={self.steps}", "--metrics.log_freq=1"),
            *("--debug.no-enable_structured_logging", *side.overrides),
        ]
        with log.open("w") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            end = time.monotonic() + self.timeout_s
            try:
                while process.poll() is None:
                    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
                    self.progress(f"{name}: {side.ranks} ranks, step {done} of {self.steps}")
                    if time.monotonic() > end:
                        raise RunError(f"{name}: no end after {self.timeout_s:.0f} s (log: {log})")
                    time.sleep(0.5)
            finally:
                _end(process)
        if process.returncode:
            raise RunError(f"{name} failed with status {process.returncode}: {_last_words(log)} (log: {log})")
        return folder


def claim(folder: Path) -> None:
    """Makes ``folder`` this command's own and empty. Raises RunError where something else is in it."""
    mark = folder / ".numerics"
    if folder.is_dir() and any(folder.iterdir()):
        if not mark.exists():
            raise RunError(f"--out {folder}: not empty, and not from an earlier call; give a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _end(process: subprocess.Popen) -> None:
    """torchrun and all its ranks."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    ours = [line.removeprefix("titan_moe: ") for line in lines if line.startswith("titan_moe: ")]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]:? *)?[\w.]*(Error|Exception)\b", line)]
    return (ours + raised + ["no error in its log"])[0]
