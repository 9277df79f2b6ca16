"""A whole training step of a debug model: our layer, and torchtitan's in the same trainer, model and data."""

import logging
import math
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_moe.bench.clock import DEVICE
from titan_moe.bench.contestants import OURS, STOCK, DifferentLayers
from titan_moe.bench.interleave import Estimate, interleaved, ratio, spread, total_ratio
from titan_moe.bench.ranks import on_ranks
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.trainer.config import load
from titan_moe.trainer.device import ONEDNN_KERNELS
from titan_moe.trainer.train import Trainer

TITLE = "Step: a training step of the DeepSeek-V3 debug model"
NOTE = (
    "titan_moe's trainer on both sides, 1536 tokens per step, bf16, no activation checkpointing; one thread "
    "per rank. ms: the slowest rank's. CPU s: of all ranks together; beside it the ratio of the sums over "
    "all steps, with its standard error, and the same of the part in user mode. On a CPU the target is for "
    "CPU s: the wall time of ranks that share cores does not resolve 2%; on a GPU for the ms."
)
REPEATS, WARMUP = 36, 8  # the first steps make the heap grow, and oneDNN's kernels
CONFIGS = Path(__file__).parent.parent.parent / "train_configs"
SIDES = {STOCK: ("--model.moe=torchtitan",), OURS: ()}
MESHES: dict[str, tuple[int, str, tuple[str, ...]]] = {  # ranks, config, and what is not in it
    "1 rank": (1, "debug_local.toml", ()),
    "FSDP2": (2, "debug_local.toml", ("--training.local_batch_size=6",)),
    "FSDP2 x EP2": (
        2,
        "debug_fsdp_ep.toml",
        ("--training.local_batch_size=6", "--parallelism.expert_parallel_degree=2"),
    ),
    "FSDP2 x TP2": (4, "debug_fsdp_tp.toml", ()),
    "FSDP2 x TP2 x EP2": (4, "debug_fsdp_tp_ep.toml", ()),
}
QUICK = ("1 rank",)
TINY = ("--training.local_batch_size=2", "--training.seq_len=32")


class Steps:
    """A trainer that takes a step at a time; a contestant."""

    def __init__(self, argv: list[str]) -> None:
        self.trainer = Trainer(Trainer.Config.of(load(argv, world_size=dist.get_world_size())))
        self.batches = self.trainer.batch_generator(self.trainer.dataloader)
        self.first_loss = math.nan
        self.cpu_seconds: list[tuple[float, float]] = []  # in all, and of that in user mode
        plain = self.trainer.forward_backward_step

        def noted(**kwargs: Any) -> torch.Tensor:
            loss = plain(**kwargs)
            self.trainer.forward_backward_step = plain  # type: ignore[method-assign]
            self.first_loss = loss.item()
            return loss

        self.trainer.forward_backward_step = noted  # type: ignore[method-assign]

    def run(self) -> None:
        """One optimizer step, its batch included."""
        before = resource.getrusage(resource.RUSAGE_SELF)
        self.trainer.step += 1
        self.trainer.train_step(self.batches)
        after = resource.getrusage(resource.RUSAGE_SELF)
        user = after.ru_utime - before.ru_utime
        self.cpu_seconds.append((user + after.ru_stime - before.ru_stime, user))

    def clear(self) -> None:
        """A step clears its gradients itself."""


def measure(settings: BenchSettings) -> Found:
    """Per mesh that there are ranks for: seconds, CPU seconds and first losses of both sides."""
    found: Found = {}
    for mesh, (ranks, config, overrides) in MESHES.items():
        if ranks > settings.ranks or (settings.quick and mesh not in QUICK):
            continue
        argv = [str(CONFIGS / config), *overrides, *(TINY if settings.quick else ())]
        found[mesh] = on_ranks(steps_on_rank, ranks, argv, settings.repeats(REPEATS))
    return found


def steps_on_rank(argv: list[str], repeats: int) -> Found:
    """On one rank of the default process group. Both trainers start from the same seed.

    Raises:
        DifferentLayers: their first losses are not the same loss.
    """
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size} | ONEDNN_KERNELS  # as in training
    logging.disable(logging.INFO)  # what torchtitan reports of its progress, once per trainer and rank
    with tempfile.TemporaryDirectory() as folder:
        quiet = ("--metrics.log_freq=1000000", "--debug.no-enable_structured_logging")
        sides = {
            name: Steps([*argv, f"--dump_folder={folder}/{name}", *quiet, *more])
            for name, more in SIDES.items()
        }
        try:
            seconds = interleaved(sides, repeats=repeats, warmup=WARMUP, over_ranks=True)
        finally:
            for side in sides.values():
                side.trainer.close()
    losses = {name: side.first_loss for name, side in sides.items()}
    if not math.isclose(*losses.values(), rel_tol=0.01):
        raise DifferentLayers(f"first losses of the same model on the same batch: {losses}")
    cpu = {name: _of_all_ranks(side.cpu_seconds[WARMUP:]) for name, side in sides.items()}
    cpu_seconds, user_seconds = ({name: both[part] for name, both in cpu.items()} for part in (0, 1))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "user_seconds": user_seconds,
        "first_loss": losses,
    }


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per mesh."""
    pair = "stock / ours"
    lines = [["mesh", "stock ms", "ours ms", pair, "stock CPU s", "ours CPU s", pair, "user mode"]]
    for mesh, sides in found.items():
        ms, cpu = ({name: sides[clock][name] for name in SIDES} for clock in ("seconds", "cpu_seconds"))
        lines.append(
            [
                mesh,
                *(spread([1e3 * taken for taken in ms[name]]).show(0) for name in SIDES),
                ratio(ms[STOCK], ms[OURS]).show(3),
                *(spread(cpu[name]).show(2) for name in SIDES),
                *(_sums(sides, clock).show(3) for clock in ("cpu_seconds", "user_seconds")),
            ]
        )
    yield lines


def figures(found: Found) -> dict[str, float]:
    """The worst mesh."""
    return {"step.worst": min(_gain(sides) for sides in found.values())} if found else {}


def _gain(sides: Found) -> float:
    if DEVICE == "cpu":
        return _sums(sides, "cpu_seconds").value
    return ratio(sides["seconds"][STOCK], sides["seconds"][OURS]).median


def _sums(sides: Found, clock: str) -> Estimate:
    return total_ratio(sides[clock][STOCK], sides[clock][OURS])


def _of_all_ranks(seconds: list[tuple[float, float]]) -> list[list[float]]:
    total = torch.tensor(seconds, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(total)
    return total.T.tolist()
