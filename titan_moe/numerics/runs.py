"""Starts the runs that are compared: one seed checkpoint, then each configuration under torchrun."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SERIAL = (
    "--parallelism.tensor_parallel_degree=1",
    "--parallelism.expert_parallel_degree=1",
    "--parallelism.pipeline_parallel_degree=1",
    "--parallelism.context_parallel_degree=1",
    "--parallelism.data_parallel_replicate_degree=1",
    "--parallelism.data_parallel_shard_degree=1",
    "--moe.dispatcher=local",
)


class RunError(RuntimeError):
    """A run that did not finish; names its log."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A configuration on a number of ranks."""

    name: str
    config: Path
    ranks: int
    folder: Path
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, text: str, folder: Path, overrides: Sequence[str]) -> "Run":
        """``CONFIG.toml`` or ``CONFIG.toml@RANKS``; without, as many as NGPU says, else 4."""
        path, _, ranks = text.partition("@")
        if ranks and not ranks.isdecimal():
            raise RunError(f"{text}: the number of ranks after @ must be a positive integer")
        number = int(ranks) if ranks else int(os.environ.get("NGPU", "4"))
        if not Path(path).is_file():
            raise RunError(f"{path}: no such file")
        return cls(
            name=name, config=Path(path), ranks=number, folder=folder / name, overrides=tuple(overrides)
        )

    def start(self, *further: str, steps: int, progress: Callable[[str], None]) -> Path:
        """Runs to the end; returns the dump folder. Raises RunError with the log's last words."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log.txt"
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc_per_node={self.ranks}", "-m", "titan_moe.train", str(self.config)),
            *(f"--dump_folder={self.folder}", f"--training.steps={steps}", "--metrics.log_freq=1"),
            *("--debug.no-enable_structured_logging", *self.overrides, *further),
        ]
        (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        with log.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            try:
                while process.poll() is None:
                    progress(f"{self.name}: step {self._steps_done()} of {steps}, {self.ranks} ranks")
                    time.sleep(0.5)
            finally:
                process.kill()
        if process.returncode:
            raise RunError(
                f"{self.name} failed with status {process.returncode}: {_last_words(log)} (log: {log})"
            )
        return self.folder

    def seed(self, progress: Callable[[str], None]) -> Path:
        """A seed checkpoint of this configuration, made on one rank."""
        seed = Run(
            name="seed",
            config=self.config,
            ranks=1,
            folder=self.folder.parent / "seed",
            overrides=self.overrides,
        )
        seed.start(
            *SERIAL,
            "--checkpoint.enable",
            "--checkpoint.create_seed_checkpoint",
            "--checkpoint.folder=checkpoint",
            steps=1,
            progress=progress,
        )
        return seed.folder / "checkpoint" / "step-0"

    def _steps_done(self) -> int:
        file = self.folder / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if "Error" in line]
    return lines[-1] if lines else "no error in its log"
