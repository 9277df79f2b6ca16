"""Random numbers that depend on a seed, a name and a place in the whole tensor, and on nothing else.

A whole tensor is cut into a grid of blocks. Each block has a stream of its own, so that a rank draws the
blocks that its shard touches and no others, and every rank that draws a block draws the same numbers. The
streams are Philox's (Salmon et al., SC 2011), which takes a key and a counter: the key says which draw of
which name, the counter says which block. They are drawn on the CPU, so a GPU gets the same numbers.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

# Numbers in a block, at most. Starting a block then costs a quarter of what drawing its numbers costs.
BLOCK = 4096
_COLUMNS = 256  # of a block, at most: a shard of columns shares few blocks with its neighbours


Kind = Literal["normal", "uniform"]


class Draw(NamedTuple):
    """One random filling of one tensor.

    Attributes:
        seed: of the whole run.
        name: of the parameter.
        number: 0 for the first filling while the parameter is initialised, 1 for the next, and so on.
        kind: "normal" has mean 0 and standard deviation 1; "uniform" lies in [0, 1).
        scale, shift: what the numbers are multiplied by, and what is added then.
    """

    seed: int
    name: str
    number: int
    kind: Kind
    scale: float
    shift: float


class _Span(NamedTuple):
    """A run of local indices along one dim that lies in one block.

    Attributes:
        block: the block's place in the grid, along this dim.
        local: indices into the shard.
        inside: the same run as indices into the block.
    """

    block: int
    local: slice
    inside: slice


@torch.no_grad()
def fill(tensor: torch.Tensor, draw: Draw) -> None:
    """Fills ``tensor`` in place with the numbers that belong to its part of the whole tensor.

    Args:
        tensor: of a floating dtype, on any device. A DTensor is filled with this rank's shard of the whole,
            in any sharded or replicated placement; a plain tensor is a whole one. Types narrower than fp32
            are drawn in fp32 and rounded; fp64 is drawn in fp64.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if local.numel() == 0:
        return
    whole = tuple(tensor.shape) or (1,)
    local = local.view(1) if local.dim() == 0 else local
    sides = block_sides(whole)
    grid = [math.ceil(size / side) for size, side in zip(whole, sides, strict=True)]
    spans = [_spans(places, side) for places, side in zip(_places(tensor), sides, strict=True)]
    source = _Source(draw, torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    for cell in itertools.product(*spans):
        corner = [span.block for span in cell]
        shape = [min(side, size - at * side) for at, side, size in zip(corner, sides, whole, strict=True)]
        numbers = source.block(_flat_index(corner, grid), shape)
        local[tuple(span.local for span in cell)].copy_(numbers[tuple(span.inside for span in cell)])


def count_drawn(tensor: torch.Tensor) -> int:
    """How many numbers this rank draws for one filling of ``tensor``, those of its neighbours included."""
    whole = tuple(tensor.shape) or (1,)
    total = 1
    for places, side, size in zip(_places(tensor), block_sides(whole), whole, strict=True):
        total *= sum(min(side, size - span.block * side) for span in _spans(places, side))
    return total


def seconds_per_million() -> float:
    """How long a million numbers of a normal draw take on this machine now, one thread."""
    rows = torch.empty(3906, 256)  # as close to a million as whole rows come
    draw = Draw(0, "a million", 0, "normal", 0.02, 0.0)
    fill(rows, draw)  # the first time takes longer
    start = time.perf_counter()
    fill(rows, draw)
    return (time.perf_counter() - start) * 1e6 / rows.numel()


def block_sides(whole: Sequence[int]) -> list[int]:
    """The shape of a full block of a tensor of shape ``whole``: wide in the last dims, thin in the first."""
    sides: list[int] = []
    room = BLOCK
    for position, size in enumerate(reversed(whole)):
        limit = min(room, _COLUMNS) if position == 0 and len(whole) > 1 else room
        sides.append(max(1, min(size, limit)))
        room //= sides[-1]
    return sides[::-1]


class _Source:
    """The blocks of one draw."""

    def __init__(self, draw: Draw, dtype: torch.dtype) -> None:
        self.draw, self.dtype = draw, dtype
        words = f"{draw.seed}\0{draw.name}\0{draw.number}".encode()
        key = np.frombuffer(hashlib.blake2b(words, digest_size=16).digest(), dtype="<u8").astype(np.uint64)
        self.philox = np.random.Philox(key=key)
        self.generator = np.random.Generator(self.philox)
        self.start = self.philox.state

    def block(self, index: int, shape: Sequence[int]) -> torch.Tensor:
        """The numbers of block ``index``, which has this shape, on the CPU."""
        # The generator counts in the low words: 2^128 steps lie between two blocks.
        self.start["state"]["counter"][:] = (0, 0, index, 0)
        self.philox.state = self.start
        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        draw = self.generator.standard_normal if self.draw.kind == "normal" else self.generator.random
        numbers = torch.from_numpy(draw(tuple(shape), dtype=dtype))
        return numbers.mul_(self.draw.scale).add_(self.draw.shift)


def _places(tensor: torch.Tensor) -> list[Sequence[int]]:
    """Per dim, where each index of the shard lies in the whole tensor."""
    whole = tuple(tensor.shape) or (1,)
    if not isinstance(tensor, DTensor):
        return [range(size) for size in whole]
    return [_places_along(tensor, dim) for dim in range(len(whole))]


def _places_along(tensor: DTensor, dim: int) -> Sequence[int]:
    """As DTensor itself shards a list of all indices, so that uneven and strided shards come out right."""
    if tensor.dim() == 0:
        return range(1)
    along = [_if_along(placement, dim, tensor.dim()) for placement in tensor.placements]
    if all(isinstance(placement, Replicate) for placement in along):
        return range(tensor.shape[dim])
    # The list lies along dim, and has one entry along the others: its placements are those of the tensor.
    indices = torch.arange(tensor.shape[dim]).view([-1 if d == dim else 1 for d in range(tensor.dim())])
    shard = distribute_tensor(indices, tensor.device_mesh, along, src_data_rank=None).to_local()
    return shard.flatten().tolist()


def _if_along(placement: Placement, dim: int, ndim: int) -> Placement:
    """``placement`` where it shards ``dim``, else Replicate."""
    if placement.is_partial():
        raise ValueError(
            f"placement {placement}: a tensor that is a sum over ranks has no single first value"
        )
    sharded_dim = getattr(placement, "dim", None)  # Shard has it, and FSDP's _StridedShard, which is no Shard
    return Replicate() if sharded_dim is None or sharded_dim % ndim != dim else placement


def _spans(places: Sequence[int], side: int) -> list[_Span]:
    """Cuts ``places`` where a block ends, or where they are not consecutive."""
    spans, start = [], 0
    while start < len(places):
        first = places[start]
        end = start + 1
        while end < len(places) and places[end] == first + end - start and places[end] % side:
            end += 1
        inside = first % side
        spans.append(_Span(first // side, slice(start, end), slice(inside, inside + end - start)))
        start = end
    return spans


def _flat_index(corner: Sequence[int], grid: Sequence[int]) -> int:
    index = 0
    for at, size in zip(corner, grid, strict=True):
        index = index * size + at
    return index
