"""What a layer's forward and backward cost, counted, not timed: kernels, copies, bytes, waits for the device.

A change that makes one of these numbers larger has to say why, here.
"""

import collections
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.ranks import RankContext, run_ranks
from titan_moe.bench.bytes_moved import FREE, GEMMS, ByteCounter
from titan_moe.bench.contestants import LAYERS, OVER_RANKS, STOCK, LayerRun, Problem
from titan_moe.bench.memory import saved_bytes_of
from titan_moe.bench.shapes import Shape
from titan_moe.layer.kernels import native

SHAPE = Shape(T=256, D=64, F=32, E=8, K=2)
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::stack"}
WAITING_OPS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
WAITING_CALLS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")

pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler: eager's ops are more")


class OpCounter(TorchDispatchMode):
    """Ops that do something (no views, no bare allocations), and the bytes of the tensors that ops make.

    What a kernel takes and gives back inside itself is not counted: a matmul's scratch differs by CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: collections.Counter[str] = collections.Counter()
        # A weak reference keeps a storage's identity from being used again, not its memory.
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def bytes_allocated(self) -> int:
        """Of every storage that an op returned and did not take."""
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts and goes on."""
        if not func.is_view and func._schema.name not in FREE:
            self.ops[func._schema.name] += 1
        out = func(*args, **kwargs or {})
        taken = set(_storages((args, kwargs)))
        self._made |= {key: made for key, made in _storages(out).items() if key not in taken}
        return out


def _storages(values: Any) -> dict[int, tuple[StorageWeakRef, int]]:
    """By identity, with the bytes of each."""
    storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]
    references = [StorageWeakRef(storage) for storage in storages]
    return {ref.cdata: (ref, storage.nbytes()) for ref, storage in zip(references, storages, strict=True)}


@contextmanager
def waits() -> Iterator[list[str]]:
    """Calls that take a tensor's value to the host, while it is open."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in WAITING_CALLS:
            patch.setattr(torch.Tensor, name, _noting(seen, name, getattr(torch.Tensor, name)))
        yield seen


def _noting(seen: list[str], name: str, own: Any) -> Any:
    def call(*args: Any) -> Any:
        seen.append(name)
        return own(*args)

    return call


def costs(run: LayerRun) -> dict[str, int]:
    """Of one forward and backward, after one to warm up."""
    run.run()
    run.clear()
    with OpCounter() as counter, waits() as waited:
        run.run()
    run.clear()
    ops = counter.ops
    there = [*run.layer.parameters(), *run.layer.buffers(), run.x_BLD, run.grad_BLD]
    with ByteCounter(there) as moved:
        run.run()
    run.clear()
    return {
        "kernels": sum(ops.values()),
        "matmuls": sum(number for name, number in ops.items() if name in GEMMS),
        "copies": sum(number for name, number in ops.items() if name in COPIES),
        "waits": len(waited) + sum(ops[name] for name in WAITING_OPS),
        "kB moved": round(moved.total / 1e3),
        "kB saved": round(saved_bytes_of(run) / 1e3),
        "kB allocated": round(counter.bytes_allocated / 1e3),
    }


# At most, by layer. Bytes of a forward and backward of SHAPE; stock's beside them are for the reader.
LIMITS: dict[str, dict[str, int]] = {
    "ours": {
        "kernels": 51,
        "matmuls": 9,
        "copies": 2,
        "waits": 0,
        "kB moved": 1420,
        "kB saved": 225,
        "kB allocated": 956,
    },
    "save inputs": {
        "kernels": 54,
        "matmuls": 11,
        "copies": 2,
        "waits": 0,
        "kB moved": 1518,
        "kB saved": 127,
        "kB allocated": 1054,
    },
}


def over(limits: dict[str, int], found: dict[str, int]) -> dict[str, int]:
    """What was found beyond its limit."""
    return {key: found[key] for key, most in limits.items() if found[key] > most}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The same for all layers."""
    return Problem.draw(SHAPE)


@pytest.mark.parametrize("name", LIMITS)
def test_no_more_than_before(problem: Problem, name: str) -> None:
    assert over(LIMITS[name], costs(problem.run(LAYERS[name]))) == {}


def test_stock_costs_more(problem: Problem) -> None:
    """The counters see that."""
    found = over(LIMITS["ours"], costs(problem.run(LAYERS[STOCK])))
    assert found.keys() >= {"copies", "matmuls", "kB moved", "kB saved", "kB allocated"}


@pytest.mark.parametrize(
    ("fault", "dearer"),
    [
        (lambda y_RD: y_RD.clone(), {"kernels", "copies", "kB moved", "kB allocated"}),
        (lambda y_RD: y_RD.float().bfloat16(), {"kernels", "copies", "kB moved", "kB allocated"}),
        (lambda y_RD: y_RD * y_RD.detach().ne(0), {"kernels", "kB moved", "kB saved"}),
        (lambda y_RD: y_RD[: int(y_RD.isfinite().all()) * y_RD.shape[0]], {"waits"}),
    ],
    ids=["a copy", "a cast", "a product", "a wait"],
)
def test_a_planted_cost_is_seen(problem: Problem, fault: Any, dearer: set[str]) -> None:
    run = problem.run(LAYERS["ours"])
    experts: Any = run.layer.routed_experts.inner_experts  # type: ignore[union-attr]
    forward = experts.forward
    experts.forward = lambda *args: fault(forward(*args))
    assert over(LIMITS["ours"], costs(run)).keys() >= dearer


def costs_on_a_rank(ctx: RankContext, name: str) -> dict[str, int]:
    mesh = ctx.device_mesh((ctx.world_size,), ("ep",))
    return costs(Problem.draw(SHAPE, rank=ctx.rank).run(OVER_RANKS[name], mesh))


@pytest.mark.parametrize(
    ("name", "kernels", "copies"),
    [("all_to_all", 78, 5), ("deepep per_rank", 135, 12), ("deepep per_slot", 124, 10)],
)
def test_one_wait_per_forward_over_ranks(name: str, kernels: int, copies: int) -> None:
    """The splits of an all-to-all are host numbers: one read of them, and no other."""
    for found in run_ranks(costs_on_a_rank, 2, name):
        assert over({"waits": 1, "kernels": kernels, "copies": copies, "matmuls": 9}, found) == {}
