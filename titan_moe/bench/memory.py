"""Bytes that a forward keeps for its backward, and the most that are allocated at a time. Both are exact.

Saved: what autograd was given to save, each storage once and whole, without parameters. Peak: every
allocation and release of torch's allocator, temporaries inside of an op too, as the profiler reports them.
"""

import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from titan_moe.bench import clock
from titan_moe.bench.contestants import INPUTS, LAYERS, OURS, STOCK, LayerRun, Problem, check_same
from titan_moe.bench.report import BenchSettings, Found, Table

TITLE = "Memory: bytes saved for backward, and peak of forward and backward"
NOTE = (
    "Saved: storages that autograd keeps, without parameters, the layer's input counted on both sides. Peak: "
    "over what was there before (weights, input, its output's gradient); the parameters' gradients are in it."
)


def measure(settings: BenchSettings) -> Found:
    """Per shape: saved and peak bytes of each layer."""
    found: Found = {}
    for shape in settings.layer_shapes:
        problem = Problem.draw(shape)
        runs = {name: problem.run(build) for name, build in LAYERS.items()}
        for name in runs.keys() - {STOCK}:
            check_same(runs[STOCK], runs[name])
        found[str(shape)] = {
            name: {"saved": saved_bytes_of(run), "peak": peak_bytes_of(run)} for name, run in runs.items()
        }
    return found


def tables(found: Found, settings: BenchSettings) -> Iterator[Table]:
    """A line per shape."""
    names = list(next(iter(found.values())))
    columns = [f"{what}, {name}" for what in ("saved MB", "peak MB") for name in names]
    columns += [f"{what}, {name} / stock" for what in ("saved", "peak") for name in names if name != STOCK]
    yield [["shape", *columns], *(_line(shape, sides) for shape, sides in found.items())]


def figures(found: Found) -> dict[str, float]:
    """The worst shape's ratios to stock."""
    return {
        f"{what}.worst of {name}": max(sides[name][what] / sides[STOCK][what] for sides in found.values())
        for name in (OURS, INPUTS)
        for what in ("saved", "peak")
    }


def saved_bytes_of(run: LayerRun) -> int:
    """Of a layer on its tokens."""
    return saved_bytes(run.forward, inputs=[run.x_BLD], parameters=run.layer.parameters())


def peak_bytes_of(run: LayerRun) -> int:
    """Of a layer's forward and backward, from no gradients."""
    run.clear()
    peak = peak_bytes(run.run)
    run.clear()
    return peak


def saved_bytes(
    forward: Callable[[], torch.Tensor],
    *,
    inputs: Iterable[torch.Tensor] = (),
    parameters: Iterable[torch.Tensor] = (),
) -> int:
    """Bytes of the storages that wait for backward when ``forward`` is done.

    Args:
        inputs: counted whether they are saved or not.
        parameters: never counted.
    """
    saved: list[weakref.ref[_Saved]] = []

    def keep(tensor: torch.Tensor) -> _Saved:
        kept = _Saved(tensor.detach())  # an output would hold its own node, and never be dropped
        saved.append(weakref.ref(kept))
        return kept

    with saved_tensors_hooks(keep, lambda kept: kept.tensor):
        out = forward()
        still = [kept.tensor for ref in saved if (kept := ref()) is not None]
    storages = {_place(tensor): tensor.untyped_storage().nbytes() for tensor in [*inputs, *still]}
    del out
    for parameter in parameters:
        storages.pop(_place(parameter), None)
    return sum(storages.values())


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes allocated at a time while ``work`` runs, over those before."""
    if clock.DEVICE == "cuda":
        return clock.cuda_peak_bytes(work)
    return max(itertools.accumulate(_allocations(work), initial=0))


class _Saved:
    """A saved tensor, gone when its node is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _allocations(work: Callable[[], object]) -> list[int]:
    """Bytes taken (positive) and given back, in order."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]"]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The profiler listens to this thread, not to its helpers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _line(shape: str, sides: dict[str, dict[str, int]]) -> list[str]:
    whats, names = ("saved", "peak"), [name for name in sides if name != STOCK]
    return [
        shape,
        *(f"{sides[name][what] / 1e6:.1f}" for what in whats for name in sides),
        *(f"{sides[name][what] / sides[STOCK][what]:.3f}" for what in whats for name in names),
    ]
