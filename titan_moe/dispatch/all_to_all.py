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
from titan_moe.dispatch.collectives import exchange_counts, exchange_rows
from titan_moe.dispatch.ops import expert_order, gather_rows, rank_to_expert_major, weighted_sum


@dataclass(frozen=True, kw_only=True)
class AllToAllMetadata(DispatchMetadata):
    """Both permutations, with their inverses, and the splits between them.

    order_N, place_TK: slots to send order (``ops.expert_order``; experts are contiguous per rank, so
    send order is rank-major). order_R, place_R: received rows to expert-major order.
    """

    topk_scores_TK: torch.Tensor
    order_N: torch.Tensor
    place_TK: torch.Tensor
    order_R: torch.Tensor
    place_R: torch.Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]


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
        order_N, place_TK = expert_order(routing.topk_expert_ids_TK)
        counts = exchange_counts(routing.num_tokens_per_expert_E, self.ep_mesh)
        rows_RD = exchange_rows(
            gather_rows(x_TD, order_N, place_TK),
            send_splits=counts.send_splits,
            receive_splits=counts.receive_splits,
            ep_mesh=self.ep_mesh,
        )
        order_R, place_R = rank_to_expert_major(counts.num_tokens_Se, rows_RD.shape[0])
        metadata = AllToAllMetadata.extend(
            layout,
            topk_scores_TK=routing.topk_scores_TK,
            order_N=order_N,
            place_TK=place_TK,
            order_R=order_R,
            place_R=place_R,
            send_splits=counts.send_splits,
            receive_splits=counts.receive_splits,
        )
        x_RD = gather_rows(rows_RD, order_R, place_R.unsqueeze(1))
        return Dispatched(x_RD, counts.num_tokens_Se.sum(0), metadata)

    def combine(self, y_RD: torch.Tensor, metadata: AllToAllMetadata) -> torch.Tensor:
        """See the contract in ``base``. The mirror of ``dispatch``; no host sync."""
        y_ND = exchange_rows(
            gather_rows(y_RD, metadata.place_R, metadata.order_R.unsqueeze(1)),
            send_splits=metadata.receive_splits,
            receive_splits=metadata.send_splits,
            ep_mesh=self.ep_mesh,
        )
        return weighted_sum(y_ND, metadata.topk_scores_TK, metadata.order_N, metadata.place_TK)
