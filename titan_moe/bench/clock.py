"""The device that is measured: its clock, its collectives, and on a GPU its peaks."""

import ctypes
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from titan_moe.trainer.device import ONEDNN_KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "nccl" if DEVICE == "cuda" else "gloo"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def seconds(work: Callable[[], None]) -> float:
    """How long ``work`` takes, on the device."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def keep_memory() -> None:
    """Freed memory stays with this process, as on a GPU; else every large tensor costs its page faults again.

    With them a matmul's time per token grows by a third from 4k to 64k tokens. glibc only; else nothing.
    """
    if DEVICE == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def keep_kernels() -> None:
    """Routes timed again and again find oneDNN's kernels made, as on a GPU; in child processes too."""
    os.environ |= dict.fromkeys(ONEDNN_KERNELS, "1024")


def barrier() -> None:
    """All ranks are here, and their devices idle."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


def slowest(taken: float) -> float:
    """The largest of all ranks' times."""
    worst = torch.tensor(taken, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def max_ranks() -> int | None:
    """As many as there are GPUs; None: processes share the CPU."""
    return torch.cuda.device_count() if DEVICE == "cuda" else None


def take_rank(rank: int) -> None:
    """This process is one of several: one GPU, or one thread."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)


def matmul_flops(size: int = 8192, repeats: int = 10) -> float | None:
    """FLOP/s of a square bf16 matmul, the ceiling of a layer's; None on a CPU."""
    if DEVICE == "cpu":
        return None
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    times = [seconds(multiply) for _ in range(3 + repeats)]
    return 2 * size**3 / min(times[3:])


def busy_seconds(work: Callable[[], object]) -> float | None:
    """What the GPU's kernels and copies take, in sum, once it need not wait for Python; None on a CPU."""
    if DEVICE == "cpu":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        work()
        torch.cuda.synchronize()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.duration_ns() for event in events if event.device_type() == DeviceType.CUDA) / 1e9


def cuda_peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes allocated on the GPU while ``work`` runs, over those before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
