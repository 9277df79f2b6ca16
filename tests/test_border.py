"""TokenBorder: from DTensor to local tokens and back, for sequences that the mesh does not divide."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.faults import FAULTS
from tests.ranks import Mode, RankContext, run_ranks
from titan_moe.layer.border import SHARDED_HIDDEN, SHARDED_TOKENS, TokenBorder

RANKS, D = 4, 8
BORDERS = {"tokens": SHARDED_TOKENS, "hidden": SHARDED_HIDDEN}
SHAPES = [*itertools.product((1, 2, 3), (0, 1, 2, 3, 4, 5, 7, 8, 9)), (0, 5)]
Cell = tuple[str, bool, int, int]  # border, whether x is sharded, B, L
CELLS: list[Cell] = [(b, sharded, *shape) for b in BORDERS for sharded in (True, False) for shape in SHAPES]


def numbers(batch: int, length: int) -> Tensor:
    """Element (b, l, d) of a (B, L, D) grid is its own place in it."""
    return torch.arange(batch * length * D, dtype=torch.float64).view(batch, length, D)


def cross(ctx: RankContext, cells: list[Cell], fault: str | None = None) -> dict[Cell, dict[str, Any]]:
    """In, times (rank + 1), and out; what was seen on the way."""
    mesh = ctx.device_mesh((RANKS,), ("tp",))
    factor = ctx.per_rank([torch.tensor(rank + 1.0, dtype=torch.float64) for rank in range(RANKS)])
    results = {}
    for cell in cells:
        name, sharded, batch, length = cell
        border: TokenBorder = BORDERS[name]
        if fault is not None:
            layer: Any = SimpleNamespace()
            FAULTS[fault](layer)
            border = layer.border
        x_BLD = ctx.replicate(numbers(batch, length)).requires_grad_()
        placed = DTensor.from_local(x_BLD, mesh, [Replicate()], run_check=False)
        placed = placed.redistribute(placements=[Shard(1)]) if sharded else placed
        x_TD, layout = border.enter(placed)
        out_BLD = border.leave(x_TD * factor, layout, like=placed)
        seen = {
            "x_TD": x_TD,
            "layout": layout,
            "placements": out_BLD.placements == placed.placements,
            "shape": tuple(out_BLD.shape),
            "stride": out_BLD.stride(),
        }
        if fault is None:
            whole_BLD = out_BLD.full_tensor()
            whole_BLD.backward(ctx.replicate(numbers(batch, length) + 1))
            seen |= {"out_BLD": whole_BLD, "x_grad_BLD": x_BLD.grad, "plain": isinstance(x_TD, DTensor)}
        results[cell] = seen
    return results


def scales(name: str, length: int) -> Tensor:
    """What the trip multiplies each position by: its rank's factor, or the sum of all."""
    if name == "hidden":
        return torch.full((1, length, 1), sum(range(1, RANKS + 1)), dtype=torch.float64)
    padded = max(-(-length // RANKS), 1)
    return (torch.arange(length, dtype=torch.float64) // padded + 1).view(1, length, 1)


def problems(rank: int, cell: Cell, seen: dict[str, Any]) -> list[str]:
    """What is wrong with a trip, by name."""
    name, _, batch, length = cell
    x_BLD, layout = numbers(batch, length), seen["layout"]
    chunks = [*x_BLD.chunk(RANKS, 1), *[x_BLD[:, :0]] * RANKS]
    own_BLD = x_BLD if name == "hidden" else chunks[rank]
    split = (0, 1) if name == "hidden" else (rank, RANKS)
    checks = {
        "x_TD": torch.equal(seen["x_TD"], own_BLD.reshape(-1, D)) and not seen["plain"],
        "tokens": torch.equal(x_BLD.view(-1, D)[layout.global_token_indices()], seen["x_TD"]),
        "local_shape": layout.local_shape == tuple(own_BLD.shape),
        "global_shape": layout.global_shape == (batch, length, D),
        "sp": (layout.sp_rank, layout.sp_size) == split,
        "placements": seen["placements"],
        "shape": seen["shape"] == (batch, length, D),
        "stride": seen["stride"] == x_BLD.stride() or x_BLD.numel() == 0,  # which then means nothing
        "out_BLD": torch.equal(seen["out_BLD"], x_BLD * scales(name, length)),
        "x_grad_BLD": torch.equal(seen["x_grad_BLD"], (x_BLD + 1) * scales(name, length)),
    }
    return [check for check, right in checks.items() if not right]


@pytest.mark.parametrize("mode", ["local_tensor", "gloo"])
def test_round_trip(mode: Mode) -> None:
    """Tokens, places, shape and stride, placements, values and gradients, on every rank."""
    wrong = {
        (rank, *cell): found
        for rank, results in enumerate(run_ranks(cross, RANKS, CELLS, mode=mode))
        for cell, seen in results.items()
        for found in [problems(rank, cell, seen)]
        if found
    }
    assert wrong == {}


def test_an_inferred_shape_is_noticed() -> None:
    """pytorch/torchtitan#3577: local * ranks is the length only where the mesh divides it."""
    cells: list[Cell] = [("tokens", True, 2, length) for length in (7, 8)]
    for results in run_ranks(cross, RANKS, cells, "inferred_shape"):
        shapes = [seen["shape"] for seen in results.values()]
        assert shapes[0] != (2, 7, D)
        assert shapes[1] == (2, 8, D)


def test_rows_are_not_copied() -> None:
    """A plain tensor goes in as a view."""
    x_BLD = numbers(2, 3)
    x_TD, _ = SHARDED_TOKENS.enter(x_BLD)
    assert x_TD.data_ptr() == x_BLD.data_ptr()


@pytest.mark.parametrize("name", BORDERS)
@pytest.mark.parametrize("shape", [(2, 5), (1, 1), (0, 3), (2, 0)])
def test_plain_tensors(name: str, shape: tuple[int, int]) -> None:
    """Without TP there is nothing to do but to flatten."""
    border = BORDERS[name]
    x_BLD = numbers(*shape).requires_grad_()
    x_TD, layout = border.enter(x_BLD)
    out_BLD = border.leave(x_TD * 3, layout, like=x_BLD)
    out_BLD.backward(torch.ones_like(out_BLD))
    assert (layout.sp_rank, layout.sp_size) == (0, 1)
    assert layout.local_shape == layout.global_shape == tuple(x_BLD.shape)
    assert torch.equal(x_TD, x_BLD.reshape(-1, D))
    assert type(out_BLD) is Tensor
    assert torch.equal(out_BLD, x_BLD * 3)
    assert x_BLD.grad is not None
    assert torch.equal(x_BLD.grad, torch.full_like(x_BLD, 3))


def test_a_transposed_tensor_enters() -> None:
    """torchtitan's attention may hand one over."""
    x_BLD = numbers(3, 2).transpose(0, 1)
    x_TD, layout = SHARDED_TOKENS.enter(x_BLD)
    assert torch.equal(SHARDED_TOKENS.leave(x_TD, layout, like=x_BLD), x_BLD)
