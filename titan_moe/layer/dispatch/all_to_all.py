"""Dispatch over EP ranks with plain all-to-all: each token travels once per chosen expert."""

from dataclasses import dataclass

import torch

from titan_moe.layer.dispatch.base import (
    Dispatched,
    DispatchLimits,
    DispatchMetadata,
    Routing,
    TokenDispatcher,
    Traffic,
)
from titan_moe.layer.dispatch.collectives import Splits, exchange_counts, exchange_rows, start_exchange, wait
from titan_moe.layer.dispatch.ops import (
    Slots,
    gather_rows,
    rank_to_expert_major,
    slots_by_key,
    sum_rows,
    weighted_sum,
)
from titan_moe.layer.layout import TokenLayout


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
    moves = "a row per token and chosen expert, both ways"
    needs = "any c10d backend"
    choose = "with EP, as the reference, or for K near the number of EP ranks"

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        """No keys of its own."""

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout
    ) -> Dispatched[AllToAllMetadata]:
        """See the contract in ``base``. One host sync, for the splits."""
        counts = exchange_counts(routing.num_tokens_per_expert_E, self.ep_mesh)
        sent = slots_by_key(routing.topk_expert_ids_TK, routing.present_TK, counts.num_rows_sent)
        rows_RD = exchange_rows(gather_rows(x_TD, sent), counts.rows, self.ep_mesh)
        received = rank_to_expert_major(counts.num_tokens_Se, rows_RD.shape[0])
        metadata = AllToAllMetadata.extend(
            layout, topk_scores_TK=routing.topk_scores_TK, sent=sent, received=received, splits=counts.rows
        )
        return Dispatched(gather_rows(rows_RD, received), counts.num_tokens_Se.sum(0), metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: AllToAllMetadata) -> torch.Tensor:
        """See the contract in ``base``. The mirror of ``dispatch``; no host sync."""
        return start_exchange(sum_rows(y_RD, metadata.received), metadata.splits.back(), self.ep_mesh)

    def finish_combine(self, in_flight: torch.Tensor, metadata: AllToAllMetadata) -> torch.Tensor:
        """See the contract in ``base``."""
        return weighted_sum(wait(in_flight), metadata.topk_scores_TK, metadata.sent)

    def traffic(self, metadata: AllToAllMetadata, itemsize: int) -> Traffic:
        """See the contract in ``base``."""
        row_bytes, rows = metadata.dim * itemsize, metadata.splits
        sent, returned = sum(rows.sent), sum(rows.received)
        return Traffic(sent, sent * row_bytes, returned, returned * row_bytes)

    def uniform_rows_per_token(self, limits: DispatchLimits) -> tuple[float, float]:
        """K each way; none without EP."""
        rows = float(limits.top_k if limits.ep_size > 1 else 0)
        return rows, rows
