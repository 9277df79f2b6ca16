"""Which EP rank owns which expert."""

from typing import NamedTuple, TypeVar

import torch

Ids = TypeVar("Ids", int, torch.Tensor)


class Ownership(NamedTuple):
    """Rank r owns ``num_local_experts`` consecutive experts; rank 0 owns the first ones.

    It is the order in which ``Shard(0)`` places the expert weights on the EP mesh.
    """

    num_experts: int  # E
    ep_size: int

    @property
    def num_local_experts(self) -> int:
        """The number of experts on each rank; ``TokenDispatcher.Config.validate`` makes sure it is whole."""
        return self.num_experts // self.ep_size

    def rank_of(self, expert_ids: Ids) -> Ids:
        """The ranks that own these experts, as ints or as a tensor of the ids' shape."""
        return expert_ids // self.num_local_experts

    def local_id_of(self, expert_ids: Ids) -> Ids:
        """The experts' numbers on their own ranks, from 0."""
        return expert_ids % self.num_local_experts

    def experts_of(self, rank: int) -> range:
        """The ids of the experts that a rank owns."""
        return range(rank * self.num_local_experts, (rank + 1) * self.num_local_experts)
