"""Dispatch over EP ranks with plain all-to-all: each token travels once per chosen expert."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.dispatch.base import (
    Dispatched,
    DispatchLimits,
    DispatchMetadata,
    Routing,
    TokenDispatcher,
)
from titan_moe.dispatch.collectives import Splits, exchange_counts, exchange_rows
from titan_moe.dispatch.ops import (
    Slots,
    gather_rows,
    rank_to_expert_major,
    slots_by_key,
    sum_rows,
    weighted_sum,
)


@dataclass(frozen=True, kw_only=True)
class AllToAllMetadata(DispatchMetadata):
    """Both permutations and the splits between them.

    sent: the N routed slots by expert; experts are contiguous per rank, so this is rank-major.
    received: the R rows that arrived, in expert-major order.
    """

    topk_scores_TK: torch.Tensor
    sent: Slots
    received: Slots
    splits: Splits


class AllToAllDispatcher(TokenDispatcher[AllToAllMetadata]):
    """Works on any c10d backend. N rows leave this rank, R rows arrive; R is data dependent."""

    requires_ep = False
    needs_host_sync = True
    bitwise_equal_to = "local"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        """No keys of its own."""

        def validate(self, limits: DispatchLimits) -> None:
            """Refuses experts that do not divide evenly over the EP ranks."""
            if limits.num_experts % limits.ep_size:
                raise ValueError(
                    f"num_experts ({limits.num_experts}) must be divisible by "
                    f"parallelism.expert_parallel_degree ({limits.ep_size})"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ep_mesh: DeviceMesh | None = None

    def bind(self, ep_mesh: DeviceMesh | None, limits: DispatchLimits) -> None:
        """Keeps the mesh whose ranks share the experts, rank r owning ids ``[r * e, (r + 1) * e)``."""
        self.ep_mesh = ep_mesh

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: DispatchMetadata
    ) -> Dispatched[AllToAllMetadata]:
        """See the contract in ``base``. One host sync, for the splits."""
        sent = slots_by_key(routing.topk_expert_ids_TK)
        counts = exchange_counts(routing.num_tokens_per_expert_E, self.ep_mesh)
        rows_RD = exchange_rows(gather_rows(x_TD, sent), counts.rows, self.ep_mesh)
        received = rank_to_expert_major(counts.num_tokens_Se, rows_RD.shape[0])
        metadata = AllToAllMetadata.extend(
            layout, topk_scores_TK=routing.topk_scores_TK, sent=sent, received=received, splits=counts.rows
        )
        return Dispatched(gather_rows(rows_RD, received), counts.num_tokens_Se.sum(0), metadata)

    def combine(self, y_RD: torch.Tensor, metadata: AllToAllMetadata) -> torch.Tensor:
        """See the contract in ``base``. The mirror of ``dispatch``; no host sync."""
        y_ND = exchange_rows(sum_rows(y_RD, metadata.received), metadata.splits.back(), self.ep_mesh)
        return weighted_sum(y_ND, metadata.topk_scores_TK, metadata.sent)
