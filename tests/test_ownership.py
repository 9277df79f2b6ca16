"""Ownership agrees with where DTensor's ``Shard(0)`` places the expert weights."""

import pytest
import torch

from titan_moe.layer.dispatch.ownership import Ownership


@pytest.mark.parametrize(("num_experts", "ep_size"), [(8, 1), (8, 2), (8, 8), (12, 4), (6, 3)])
def test_ranks_own_what_shard_0_gives_them(num_experts: int, ep_size: int) -> None:
    owners = Ownership(num_experts, ep_size)
    ids_E = torch.arange(num_experts)
    for rank, shard_e in enumerate(ids_E.chunk(ep_size)):
        assert list(owners.experts_of(rank)) == shard_e.tolist()
        assert (owners.rank_of(shard_e) == rank).all()
        assert owners.local_id_of(shard_e).tolist() == list(range(owners.num_local_experts))
        assert all(owners.rank_of(expert) == rank for expert in shard_e.tolist())
