"""DeepEP's idea on c10d collectives. The legend is in ``titan_moe/layer/moe.py``.

A token goes once to each rank that owns at least one of its K experts, and each of its picks, its code and
its score, to the rank that owns the expert (deepseek-ai/DeepEP sends all K picks with every row).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.layer.dispatch.base import Dispatched, DispatchMetadata, Routing, Traffic
from titan_moe.layer.dispatch.collectives import Splits, exchange_counts, exchange_rows, start_exchange, wait
from titan_moe.layer.dispatch.ops import Slots, gather_rows, slots_by_key, sum_rows, weighted_sum
from titan_moe.layer.dispatch.ownership import Ownership
from titan_moe.layer.layout import TokenLayout


class Outgoing(NamedTuple):
    """What this rank knows once the counts are exchanged: M rows and N picks leave, U and R will arrive.

    Attributes:
        copies: the M rows as slots of a (T, S ranks) grid: ordered by rank, inside a rank by token.
        copy_splits: M and U by rank.
        picks: the N picks as slots of the (T, K) grid, in the order of ``copies``.
        pick_splits: N and R by rank.
        code_N: int64: 2 * local expert id, plus 1 if it is the token's first pick on that rank.
        counts_e: rows of each local expert.
    """

    copies: Slots
    copy_splits: Splits
    picks: Slots
    pick_splits: Splits
    code_N: torch.Tensor
    counts_e: torch.Tensor


class Arrived(NamedTuple):
    """The R picks that came, as rows in three orders; K is 1 in the first and the last.

    Attributes:
        by_expert: as they arrive, in expert-major order.
        rows: the expert-major rows as slots of the arrived (U, K) grid.
        grid: as they arrive, as slots of that grid, each slot for itself.
    """

    by_expert: Slots
    rows: Slots
    grid: Slots


@dataclass(frozen=True, kw_only=True)
class PickMetadata(DispatchMetadata):
    """``scores`` are per arrived row, (U, K), in PerRank, and per token, (T, K), in PerSlot."""

    out: Outgoing
    arrived: Arrived
    scores: torch.Tensor


@dataclass(frozen=True)
class PerRank:
    """Each rank weighs and sums a token's rows in fp32 and returns one, rounded to the rows' dtype."""

    ep_mesh: DeviceMesh
    num_experts: int

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout) -> Dispatched[PickMetadata]:
        """One count exchange, one host sync. The picks arrive while the rows are in flight."""
        out = prepare(routing, self.ep_mesh, self.num_experts)
        rows = start_exchange(gather_rows(x_TD, out.copies), out.copy_splits, self.ep_mesh)
        scores_N = gather_rows(routing.topk_scores_TK.reshape(-1, 1), out.picks.ungrouped).squeeze(1)
        # One exchange for both: a code is a whole number that fp32 holds exactly.
        picks_N2 = torch.stack([scores_N, out.code_N.to(scores_N.dtype)], dim=1)
        scores_R, code_R = exchange_rows(picks_N2, out.pick_splits, self.ep_mesh).unbind(1)
        arrived = arrange(code_R.detach().to(torch.int64), out, routing.topk_expert_ids_TK.shape[1])
        scores_U = sum_rows(scores_R.unsqueeze(1), arrived.grid)
        x_UD = wait(rows)
        metadata = PickMetadata.extend(
            layout,
            out=out,
            arrived=arrived,
            scores=scores_U.view_as(arrived.rows.place_TK),
            source=arrived.rows.source(x_UD),
        )
        return Dispatched(gather_rows(x_UD, arrived.rows), out.counts_e, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: PickMetadata) -> torch.Tensor:
        """(R, D) to the (M, D) partial sums of this rank's tokens, in flight."""
        z_UD = weighted_sum(y_RD, metadata.scores, metadata.arrived.rows)
        return start_exchange(z_UD, metadata.out.copy_splits.back(), self.ep_mesh)

    def finish_combine(self, in_flight: torch.Tensor, metadata: PickMetadata) -> torch.Tensor:
        """(T, D): summed over ranks, in rank order."""
        return sum_rows(wait(in_flight), metadata.out.copies)

    def traffic(self, metadata: PickMetadata, itemsize: int) -> Traffic:
        """A row per token and rank, both ways; with each pick, its code and its score."""
        sent, received = map(sum, metadata.out.copy_splits)
        pick_bytes = sum(metadata.out.pick_splits.sent) * 2 * metadata.scores.element_size()
        row_bytes = metadata.dim * itemsize
        return Traffic(sent, sent * row_bytes + pick_bytes, received, received * row_bytes)


@dataclass(frozen=True)
class PerSlot:
    """Each token goes once to a rank, and all K results come back; so do the K gradients of its rows."""

    ep_mesh: DeviceMesh
    num_experts: int

    def dispatch(self, x_TD: torch.Tensor, routing: Routing, layout: TokenLayout) -> Dispatched[PickMetadata]:
        """One count exchange, one host sync."""
        out = prepare(routing, self.ep_mesh, self.num_experts)
        code_R = exchange_rows(out.code_N.to(torch.int32), out.pick_splits, self.ep_mesh)
        arrived = arrange(code_R.to(torch.int64), out, routing.topk_expert_ids_TK.shape[1])
        slots = (*out.copies, *out.picks, *arrived.by_expert, *arrived.rows)
        x_RD = _SendOnceReturnEach.apply(x_TD, out.copy_splits, out.pick_splits, self.ep_mesh, *slots)
        metadata = PickMetadata.extend(layout, out=out, arrived=arrived, scores=routing.topk_scores_TK)
        return Dispatched(x_RD, out.counts_e, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: PickMetadata) -> torch.Tensor:
        """(R, D) to the (N, D) rows of this rank's picks, in flight."""
        y_RD = sum_rows(y_RD, metadata.arrived.by_expert)
        return start_exchange(y_RD, metadata.out.pick_splits.back(), self.ep_mesh)

    def finish_combine(self, in_flight: torch.Tensor, metadata: PickMetadata) -> torch.Tensor:
        """(T, D): in slot order, rounded once."""
        return weighted_sum(wait(in_flight), metadata.scores, metadata.out.picks)

    def traffic(self, metadata: PickMetadata, itemsize: int) -> Traffic:
        """A row per token and rank out, with each pick's code; a row per pick back, and in backward."""
        picks, row_bytes = metadata.out.pick_splits, metadata.dim * itemsize
        sent, returned = sum(metadata.out.copy_splits.sent), sum(picks.received)
        return Traffic(sent, sent * row_bytes + 4 * sum(picks.sent), returned, returned * row_bytes)


@torch.no_grad()
def prepare(routing: Routing, ep_mesh: DeviceMesh, num_experts: int) -> Outgoing:
    """Who gets what. One count exchange, and the host sync."""
    ids_TK, owners = routing.topk_expert_ids_TK, Ownership(num_experts, ep_mesh.size())
    rank_TK = owners.rank_of(ids_TK)
    goes_TS = _ranks_of(rank_TK, routing.present_TK, ep_mesh.size())
    counts = exchange_counts(routing.num_tokens_per_expert_E, ep_mesh, goes_TS.sum(0))
    ranks_S = torch.arange(ep_mesh.size(), device=ids_TK.device)
    picks = slots_by_key(rank_TK, routing.present_TK, counts.num_rows_sent)
    is_first_N = _is_first(rank_TK.flatten().index_select(0, picks.order_N), picks.token_N)
    expert_N = owners.local_id_of(ids_TK).flatten().index_select(0, picks.order_N)
    return Outgoing(
        copies=slots_by_key(ranks_S.expand_as(goes_TS), goes_TS, sum(counts.copies.sent)),
        copy_splits=counts.copies,
        picks=picks,
        pick_splits=counts.rows,
        code_N=2 * expert_N + is_first_N,
        counts_e=counts.num_tokens_Se.sum(0),
    )


@torch.no_grad()
def arrange(code_R: torch.Tensor, out: Outgoing, top_k: int) -> Arrived:
    """Where the picks that came stand: the k-th pick of a row is in column k of the (U, K) grid."""
    by_expert = slots_by_key((code_R // 2).unsqueeze(1))
    row_R = (code_R % 2).cumsum(0) - 1
    arrival_R = torch.arange(row_R.shape[0], device=row_R.device)
    number_R = row_R * top_k + arrival_R - torch.searchsorted(row_R, row_R)
    none_N = number_R.new_zeros(sum(out.copy_splits.received) * top_k)
    present_N = none_N.bool().index_fill_(0, number_R, True)
    row_place_N = none_N.scatter(0, number_R, by_expert.place_TK.flatten())
    place_N = none_N.scatter(0, number_R, arrival_R)
    return Arrived(
        by_expert=by_expert,
        rows=Slots(
            number_R.index_select(0, by_expert.order_N),
            row_place_N.view(-1, top_k),
            present_N.view(-1, top_k),
        ),
        grid=Slots(number_R, place_N.unsqueeze(1), present_N.unsqueeze(1)),
    )


class _SendOnceReturnEach(torch.autograd.Function):
    """Forward sends a token once per rank; backward returns the gradient of each of its K rows.

    The gradients are then summed where all_to_all sums them: in slot order, on the token's own rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        copies: Splits,
        picks: Splits,
        ep_mesh: DeviceMesh,
        *slots: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.picks, ctx.ep_mesh = picks, ep_mesh
        ctx.save_for_backward(*slots)
        sent, _, _, experts = _by_threes(slots)
        x_UD = exchange_rows(gather_rows(x_TD, sent), copies, ep_mesh)
        return gather_rows(x_UD, experts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_RD,) = grads
        slots = ctx.saved_tensors
        _, picks, arrived, _ = _by_threes(slots)
        grad_ND = exchange_rows(sum_rows(grad_RD, arrived), ctx.picks.back(), ctx.ep_mesh)
        return sum_rows(grad_ND, picks), *[None] * (3 + len(slots))


def _by_threes(tensors: tuple[Any, ...]) -> list[Slots]:
    return [Slots(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]


def _ranks_of(rank_TK: torch.Tensor, present_TK: torch.Tensor | None, ep_size: int) -> torch.Tensor:
    """``(T, S)`` bool: the ranks that own one of a token's experts."""
    if present_TK is not None:
        rank_TK = torch.where(present_TK, rank_TK, ep_size)  # into a column that is cut below
    goes = rank_TK.new_zeros(rank_TK.shape[0], ep_size + 1, dtype=torch.bool)
    return goes.scatter_(1, rank_TK, True)[:, :ep_size]


def _is_first(rank_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
    """Which picks, ordered by rank and token, are the first of their row."""
    changes = [row.diff(prepend=row.new_full((1,), -1)) != 0 for row in (rank_N, token_N)]
    return changes[0] | changes[1]
