"""Each kernel alone: the bytes that it must move over its time, beside what a plain copy reaches here."""

from collections.abc import Callable, Iterator

import torch

from titan_moe.bench.clock import DEVICE
from titan_moe.bench.interleave import interleaved, spread
from titan_moe.bench.report import BenchSettings, Found, Table
from titan_moe.bench.shapes import BF16, FP32, INT64, Shape
from titan_moe.layer.kernels import ops as kernels

TITLE = "Kernels: bandwidth beside a copy's"
NOTE = (
    "bf16 rows; each input counted once, each output once, although permute and weighted_sum_backward read a "
    "token's row K times; median us (quartiles) of a launch, ten in a row. Ceiling: a copy of one tensor "
    "into another, in the same turns."
)
REPEATS, WARMUP, LAUNCHES = 15, 2, 10
COPY = "copy"
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes


class Kernel:
    """Launches of one kernel; a contestant.

    Args:
        moved: bytes of one launch.
    """

    def __init__(self, moved: int, launch: Callable[[], object]) -> None:
        self.moved, self.launch = moved, launch

    def run(self) -> None:
        """Ten, so that a GPU does not wait for Python."""
        for _ in range(LAUNCHES):
            self.launch()

    def clear(self) -> None:
        """Nothing is kept."""


def measure(settings: BenchSettings) -> Found:
    """Per shape and kernel: bytes of a launch and seconds of each."""
    return {str(shape): _measure(shape, settings.repeats(REPEATS)) for shape in settings.kernel_shapes}


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per shape and kernel."""
    lines = [["shape", "kernel", "MB", "us", "GB/s", "of a copy's"]]
    for shape, by_kernel in found.items():
        ceiling = _bytes_per_second(by_kernel[COPY])
        for name, one in by_kernel.items():
            speed = _bytes_per_second(one)
            us = spread([1e6 * taken for taken in one["seconds"]]).show(1)
            share = f"{speed / ceiling:.0%}"
            lines.append([shape, name, f"{one['moved'] / 1e6:.1f}", us, f"{speed / 1e9:.0f}", share])
    yield lines


def figures(found: Found) -> dict[str, float]:
    """None: no target is for them."""
    return {}


def launches(shape: Shape) -> dict[str, Kernel]:
    """Every kernel of a layer on routes drawn at random, and the copy."""
    T, D, F, K, N = shape.T, shape.D, shape.F, shape.K, shape.N
    order_N = torch.randperm(N, device=DEVICE)
    place_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(N, device=DEVICE)).view(T, K)
    token_N, scores_TK = order_N // K, torch.rand(T, K, device=DEVICE)
    x_TD, y_ND, also_ND = _rows(T, D), _rows(N, D), _rows(N, D)
    gate_NF, up_NF, grad_NF = _rows(N, F), _rows(N, F), _rows(N, F)
    source = torch.ones(COPIED[DEVICE], dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ids, scores = N * INT64, N * FP32
    return {
        COPY: Kernel(2 * source.numel(), lambda: target.copy_(source)),
        "permute (torch's index_select)": Kernel(
            BF16 * (T + N) * D + ids, lambda: x_TD.index_select(0, token_N)
        ),
        "swiglu": Kernel(BF16 * 3 * N * F, lambda: kernels.swiglu(gate_NF, up_NF)),
        "weighted_sum": Kernel(
            BF16 * (N + T) * D + ids + scores, lambda: kernels.weighted_sum(y_ND, scores_TK, place_TK)
        ),
        "weighted_sum_backward": Kernel(
            BF16 * (T + 2 * N) * D + ids + 2 * scores,
            lambda: kernels.weighted_sum_backward(x_TD, y_ND, scores_TK, order_N),
        ),
        "swiglu_backward": Kernel(BF16 * 5 * N * F, lambda: kernels.swiglu_backward(grad_NF, gate_NF, up_NF)),
        "sum_rows of two": Kernel(
            BF16 * (2 * N + T) * D + ids, lambda: kernels.sum_rows(y_ND, place_TK, None, also_ND)
        ),
    }


def _measure(shape: Shape, repeats: int) -> Found:
    all_of_it = launches(shape)
    seconds = interleaved(all_of_it, repeats=repeats, warmup=WARMUP)
    return {
        name: {"moved": one.moved, "seconds": [taken / LAUNCHES for taken in seconds[name]]}
        for name, one in all_of_it.items()
    }


def _bytes_per_second(one: Found) -> float:
    return one["moved"] / spread(one["seconds"]).median


def _rows(count: int, columns: int) -> torch.Tensor:
    return torch.randn(count, columns, dtype=torch.bfloat16, device=DEVICE)
