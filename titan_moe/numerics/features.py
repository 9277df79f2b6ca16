"""What is kept of a token: enough to say whether two runs agree on it, and how far apart they are.

Per token three numbers, whatever the width of its row x: a hash of the bits of x, the norm |x|, and the
projection of x on a fixed vector of +1 and -1. For errors d without a preferred direction the mean square of
the projections' differences is that of |d|, so two runs can be compared without keeping their rows.
"""

from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from titan_moe.dispatch.base import DispatchMetadata

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Features(NamedTuple):
    """Of T tokens."""

    bits_T: torch.Tensor  # int64
    norm_T: torch.Tensor  # fp64
    projection_T: torch.Tensor  # fp64


def features(x_TD: torch.Tensor) -> Features:
    """Computed on x's device; no host sync."""
    x_TD = x_TD.detach().contiguous()
    wide_TD = x_TD.double()
    places_D = torch.arange(1, x_TD.shape[1] + 1, device=x_TD.device)
    # Knuth's MMIX generator, of which the top bit is taken; the hash wraps around.
    mixed_D = places_D * 6364136223846793005 + 1442695040888963407
    signs_D = torch.where(mixed_D < 0, -1.0, 1.0).double()
    bits_T = (x_TD.view(_INTEGERS[x_TD.element_size()]).long() * mixed_D).sum(1)
    return Features(bits_T, wide_TD.norm(dim=1), wide_TD @ signs_D)


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
    layout = DispatchMetadata.of(
        local_batch_size=batch_size,
        local_seq_len=local.shape[1],
        dim=local.shape[2],
        global_seq_len=seq_len,
        sp_rank=rank,
        sp_size=size,
    )
    return local.flatten(0, 1).flatten(1), layout.global_token_indices(local.device)
