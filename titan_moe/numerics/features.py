"""What is kept of a token: enough to say whether two runs agree on it, and how far apart they are.

Per token, whatever the width of its row x: a hash of the bits of x, the norm |x|, and the projections of x
on a few fixed vectors of +1 and -1. The mean square of the projections' differences is that of |d|, so two
runs can be compared without keeping their rows.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from titan_moe.layer.layout import TokenLayout

PROJECTIONS = 4  # Q
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Features(NamedTuple):
    """Of T tokens."""

    bits_T: torch.Tensor  # int64
    norm_T: torch.Tensor  # fp64
    projection_TQ: torch.Tensor  # fp64


def features(x_TD: torch.Tensor) -> Features:
    """Computed on x's device; no host sync."""
    x_TD = x_TD.detach().contiguous()
    wide_TD = x_TD.double()
    odd_D, signs_DQ = _fixed(x_TD.shape[1], x_TD.device)
    bits_T = (x_TD.view(_INTEGERS[x_TD.element_size()]).long() * odd_D).sum(1)
    return Features(bits_T, wide_TD.norm(dim=1), wide_TD @ signs_DQ)


def distance(left_TQ: torch.Tensor, right_TQ: torch.Tensor) -> torch.Tensor:
    """``(T,)``: an estimate of |difference| per token, from projections."""
    return (left_TQ - right_TQ).square().mean(1).sqrt()


@lru_cache(maxsize=64)
def _fixed(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Odd multipliers for the hash, which wraps around, and the projections' vectors."""
    numbers = torch.arange(width * (PROJECTIONS + 1), device=device)
    mixed = _splitmix64(numbers).view(PROJECTIONS + 1, width)
    return mixed[0] | 1, torch.where(mixed[1:] < 0, -1.0, 1.0).double().t().contiguous()


def _splitmix64(numbers: torch.Tensor) -> torch.Tensor:
    """Steele, Lea and Flood 2014: the n-th output of that generator from seed 0, for each n."""
    z = (numbers + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(constant: int) -> int:
    return constant - (1 << 64)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    """A shift that fills with zeros; torch's own keeps the sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def local_tokens(x: torch.Tensor, batch_size: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(T, D)`` rows of this rank and their places in the (B, L) grid; None where rows are not whole tokens.

    Args:
        x: ``(B, L, ...)``, plain, or a DTensor that is replicated or sharded along L.
    """
    if x.dim() < 3 or tuple(x.shape[:2]) != (batch_size, seq_len):
        return None
    rank, size, local = 0, 1, x
    if isinstance(x, DTensor):
        sharded = [dim for dim, place in enumerate(x.placements) if not place.is_replicate()]
        if len(sharded) > 1 or any(not x.placements[dim].is_shard(1) for dim in sharded):
            return None
        local = x.to_local()
        if sharded:
            rank, size = x.device_mesh.get_local_rank(sharded[0]), x.device_mesh.size(sharded[0])
    layout = TokenLayout(
        local_batch_size=batch_size,
        local_seq_len=local.shape[1],
        dim=local.shape[2],
        global_seq_len=seq_len,
        sp_rank=rank,
        sp_size=size,
    )
    return local.flatten(0, 1).flatten(1), layout.global_token_indices(local.device)
