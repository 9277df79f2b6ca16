"""Numbers by seed, name and position: every shard of every mesh is a part of the same whole tensor.

A fake process group stands for the other ranks, so that a mesh of 16 is tried in one process: nothing here
communicates. What a shard must hold comes from ``distribute_tensor``, which knows nothing of blocks.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from titan_moe.parallel import blocks
from titan_moe.parallel.blocks import BLOCK, Draw, block_sides, count_drawn, fill

SHAPES = [
    (),
    (1,),
    (3,),
    (9001,),
    (7, 5),
    (33, 300),
    (100, 257),
    (5, 40, 70),
    (8, 17, 259),
    (12, 3, 2, 2),
    (0, 4),
]
NORMAL = Draw(1, "w", 0, "normal", 0.02, 0.0)


def whole(shape: Sequence[int], draw: Draw = NORMAL, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The whole tensor on one rank."""
    tensor = torch.full(tuple(shape), math.nan, dtype=dtype)
    fill(tensor, draw)
    return tensor


@pytest.fixture
def fake_rank() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _placements(ndim: int) -> Iterator[tuple[Placement, Placement]]:
    """On a mesh of two axes, as FSDP x TP and EP x FSDP make them."""
    dims = range(ndim)
    one: list[Placement] = [Replicate(), *(Shard(d) for d in dims)]
    yield from itertools.product(one, one)
    yield from ((_StridedShard(d, split_factor=4), Shard(d)) for d in dims)


def _shards_that_differ(shape: tuple[int, ...], size: tuple[int, int]) -> list[str]:
    """Each rank of the mesh in turn, each placement."""
    expected, wrong = whole(shape), []
    for rank in range(size[0] * size[1]):
        dist.init_process_group("fake", rank=rank, world_size=size[0] * size[1], store=FakeStore())
        mesh = init_device_mesh("cpu", size, mesh_dim_names=("a", "b"))
        for placements in _placements(len(shape)):
            theirs = distribute_tensor(expected, mesh, placements, src_data_rank=None)
            empty = torch.full_like(theirs.to_local(), math.nan)
            stride = expected.stride()
            ours = DTensor.from_local(empty, mesh, placements, run_check=False, shape=shape, stride=stride)
            fill(ours, NORMAL)
            if not torch.equal(ours.to_local(), theirs.to_local()):
                wrong.append(f"rank {rank} {placements}")
        dist.destroy_process_group()
    return wrong


class TestFill:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_every_shard_is_its_part_of_the_whole(self, shape: tuple[int, ...], fake_rank: None) -> None:
        assert not whole(shape).isnan().any()
        assert _shards_that_differ(shape, (2, 4)) == []

    def test_a_block_without_a_key_of_its_own(self, fake_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """The control: streams that are keyed by name alone."""
        monkeypatch.setattr(blocks, "_flat_index", lambda corner, grid: 0)
        assert _has_equal_blocks(whole((64, 300)))
        one_stream_per_rank = whole((64, 300))[:32]
        monkeypatch.undo()
        assert not torch.equal(one_stream_per_rank, whole((64, 300))[:32])

    @pytest.mark.parametrize("field", ["seed", "name", "number"])
    def test_what_a_number_depends_on(self, field: str) -> None:
        other = NORMAL._replace(**{field: "v" if field == "name" else 7})
        assert torch.equal(whole((33, 300)), whole((33, 300)))
        assert not (whole((33, 300), other) == whole((33, 300))).any()

    def test_no_two_rows_or_columns_are_equal(self) -> None:
        assert not _has_equal_blocks(whole((300, 700)))

    def test_narrow_types_round_what_fp32_draws(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(whole((33, 300), dtype=dtype), whole((33, 300)).to(dtype))
        assert whole((33, 300), dtype=torch.float64).float().unique().numel() > 9000

    def test_a_view_that_is_not_contiguous(self) -> None:
        turned = torch.empty(300, 33).t()
        fill(turned, NORMAL)
        assert torch.equal(turned, whole((33, 300)))

    def test_scale_and_shift(self) -> None:
        uniform = whole((100, 257), Draw(1, "w", 0, "uniform", 4.0, -1.0))
        assert -1 <= uniform.min() < -0.99
        assert 2.99 < uniform.max() <= 3

    def test_a_sum_over_ranks_has_no_first_value(self, fake_rank: None) -> None:
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="sum over ranks"):
            fill(DTensor.from_local(torch.empty(3), mesh, [Partial()]), NORMAL)


class TestWhatARankDraws:
    @pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
    def test_blocks_are_small_and_cover(self, shape: tuple[int, ...]) -> None:
        sides = block_sides(shape or (1,))
        assert 1 <= math.prod(sides) <= BLOCK
        assert count_drawn(torch.empty(shape)) == max(1, math.prod(shape))

    def test_it_is_what_is_drawn(self, fake_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted where blocks are made, for a shard of odd rows and columns."""
        dist.init_process_group("fake", rank=3, world_size=8, store=FakeStore())
        mesh = init_device_mesh("cpu", (2, 4))
        drawn = []
        block = blocks._Source.block
        monkeypatch.setattr(
            blocks._Source,
            "block",
            lambda self, at, shape: drawn.append(math.prod(shape)) or block(self, at, shape),
        )
        shard = distribute_tensor(torch.empty(100, 3000), mesh, [Shard(0), Shard(1)], src_data_rank=None)
        fill(shard, NORMAL)
        assert sum(drawn) == count_drawn(shard)
        assert shard.to_local().numel() <= sum(drawn) < 2 * shard.to_local().numel()


def _has_equal_blocks(tensor: torch.Tensor) -> bool:
    return any(t.unique(dim=dim).shape[dim] < t.shape[dim] for t in [tensor] for dim in range(t.dim()))
