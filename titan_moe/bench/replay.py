"""``python -m titan_moe.bench.replay``: what a replay costs a training step, with and without in turn.

One process of one thread, the debug_local config. The first run records; the second replays every other step
of it, so that both kinds of step share the machine's moods. CPU seconds, without the check.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

STEPS = 44
CONFIG = Path(__file__).parent.parent.parent / "train_configs" / "debug_local.toml"


def step_times(folder: str, mode: str) -> list[float]:
    """CPU seconds of each step; when replaying, of which the odd ones replay."""
    argv = [str(CONFIG), f"--dump_folder={folder}/{mode}", f"--training.steps={STEPS}"]
    argv += [f"--routing_replay.mode={mode}", f"--routing_replay.path={folder}/trace"]
    trainer = Trainer(Trainer.Config.of(load([*argv, "--routing_replay.no-check_weights"], world_size=1)))
    replay, plain_step, times = trainer.replay, trainer.train_step, []

    def timed(data_iterator: Iterator[Any]) -> None:
        trainer.replay = None if mode == "replay" and trainer.step % 2 == 0 else replay
        with _timing(times):
            plain_step(data_iterator)
        trainer.replay = replay

    trainer.train_step = timed  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close()
    return times


@contextmanager
def _timing(times: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    times.append(time.process_time() - start)


def main() -> None:
    """Prints medians of both kinds of step, the first two of each left out."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    os.environ.setdefault("MASTER_PORT", "29555")
    torch.set_num_threads(1)  # as torchrun has it
    with tempfile.TemporaryDirectory() as folder:
        step_times(folder, "record")
        times = step_times(folder, "replay")
    replayed, plain = times[4::2], times[5::2]
    medians = [statistics.median(kind) for kind in (replayed, plain)]
    # Of a median: 1.25 times that of a mean.
    error = 1.25 * statistics.stdev(plain) / len(plain) ** 0.5 / medians[1]
    sys.stdout.write(
        f"replayed {medians[0]:.3f} s, live {medians[1]:.3f} s per step (medians of {len(plain)}): "
        f"{medians[0] / medians[1] - 1:+.1%}; standard error of each {error:.1%}\n"
    )


if __name__ == "__main__":
    main()
