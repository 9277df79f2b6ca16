"""Runs a function on every rank of a fresh group of processes on this machine."""

import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from titan_moe.bench import clock


class RanksTimeout(TimeoutError):
    """Some rank did not come to an end; all were killed."""


def on_ranks(body: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 1800) -> Any:
    """What ``body(*args)`` returns on rank 0. One thread, or one GPU, per rank.

    Args:
        body: a top-level function of a module; it finds the default process group set up.
        timeout_s: for all of it; a rank that fails ends the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, timeout_s, body, args)
        context = mp.spawn(_rank, args=arguments, nprocs=world_size, join=False)
        assert context is not None
        end = time.monotonic() + timeout_s
        try:
            while not context.join(timeout=1):
                if time.monotonic() > end:
                    raise RanksTimeout(f"{body.__module__}: {world_size} ranks, no end after {timeout_s} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return torch.load(Path(folder) / "result")


def _rank(
    rank: int, world_size: int, folder: str, timeout_s: float, body: Callable[..., Any], args: Any
) -> None:
    clock.take_rank(rank)
    clock.keep_memory()
    dist.init_process_group(
        clock.BACKEND,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    result = body(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.destroy_process_group()
