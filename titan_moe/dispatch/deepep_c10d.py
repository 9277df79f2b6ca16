"""DeepEP's idea on c10d collectives. The legend is in ``titan_moe/moe.py``.

A token goes once to each rank that owns at least one of its K experts, and each of its picks, 8 bytes,
to the rank that owns the expert (deepseek-ai/DeepEP sends all K picks with every row).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_moe.dispatch.base import Dispatched, DispatchMetadata, Routing, Traffic
from titan_moe.dispatch.collectives import Splits, exchange_counts, exchange_rows, start_exchange, wait
from titan_moe.dispatch.ops import Slots, gather_rows, slots_by_key, sum_rows, weighted_sum


class Plan(NamedTuple):
    """M rows leave this rank, U arrive, and become R rows for the local experts.

    Attributes:
        copies: the M rows as slots of a (T, S ranks) grid: ordered by rank, inside a rank by token.
        copy_splits: M and U by rank.
        picks: the N picks as slots of the (T, K) grid, in the order of ``copies``.
        pick_splits: N and R by rank.
        arrived: the R picks as they arrive, in expert-major order: K is 1.
        experts: the same R rows as slots of the arrived (U, K) grid.
    """

    copies: Slots
    copy_splits: Splits
    picks: Slots
    pick_splits: Splits
    arrived: Slots
    experts: Slots


@dataclass(frozen=True, kw_only=True)
class PlanMetadata(DispatchMetadata):
    """``scores`` are per arrived row, (U, K), in PerRank, and per token, (T, K), in PerSlot."""

    plan: Plan
    scores: torch.Tensor


@dataclass(frozen=True)
class PerRank:
    """Each rank weighs and sums a token's rows in fp32 and returns one, rounded to the rows' dtype."""

    ep_mesh: DeviceMesh
    num_experts: int

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: DispatchMetadata
    ) -> Dispatched[PlanMetadata]:
        """One count exchange, one host sync."""
        plan, counts_e = make_plan(routing, self.ep_mesh, self.num_experts)
        x_UD = exchange_rows(gather_rows(x_TD, plan.copies), plan.copy_splits, self.ep_mesh)
        scores_UK = _send_scores(routing.topk_scores_TK, plan, self.ep_mesh)
        source = plan.experts.source(x_UD)
        metadata = PlanMetadata.extend(layout, plan=plan, scores=scores_UK, source=source)
        return Dispatched(gather_rows(x_UD, plan.experts), counts_e, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: PlanMetadata) -> torch.Tensor:
        """(R, D) to the (M, D) partial sums of this rank's tokens, in flight."""
        z_UD = weighted_sum(y_RD, metadata.scores, metadata.plan.experts)
        return start_exchange(z_UD, metadata.plan.copy_splits.back(), self.ep_mesh)

    def finish_combine(self, in_flight: torch.Tensor, metadata: PlanMetadata) -> torch.Tensor:
        """(T, D): summed over ranks, in rank order."""
        return sum_rows(wait(in_flight), metadata.plan.copies)

    def traffic(self, metadata: PlanMetadata, itemsize: int) -> Traffic:
        """A row per token and rank, both ways; with each pick, its code and its score."""
        sent, received = map(sum, metadata.plan.copy_splits)
        pick_bytes = sum(metadata.plan.pick_splits.sent) * (4 + metadata.scores.element_size())
        row_bytes = metadata.dim * itemsize
        return Traffic(sent, sent * row_bytes + pick_bytes, received, received * row_bytes)


@dataclass(frozen=True)
class PerSlot:
    """Each token goes once to a rank, and all K results come back; so do the K gradients of its rows."""

    ep_mesh: DeviceMesh
    num_experts: int

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: DispatchMetadata
    ) -> Dispatched[PlanMetadata]:
        """One count exchange, one host sync."""
        plan, counts_e = make_plan(routing, self.ep_mesh, self.num_experts)
        slots = (*plan.copies, *plan.picks, *plan.arrived, *plan.experts)
        x_RD = _SendOnceReturnEach.apply(x_TD, plan.copy_splits, plan.pick_splits, self.ep_mesh, *slots)
        metadata = PlanMetadata.extend(layout, plan=plan, scores=routing.topk_scores_TK)
        return Dispatched(x_RD, counts_e, metadata)

    def start_combine(self, y_RD: torch.Tensor, metadata: PlanMetadata) -> torch.Tensor:
        """(R, D) to the (N, D) rows of this rank's picks, in flight."""
        y_RD = sum_rows(y_RD, metadata.plan.arrived)
        return start_exchange(y_RD, metadata.plan.pick_splits.back(), self.ep_mesh)

    def finish_combine(self, in_flight: torch.Tensor, metadata: PlanMetadata) -> torch.Tensor:
        """(T, D): in slot order, rounded once."""
        return weighted_sum(wait(in_flight), metadata.scores, metadata.plan.picks)

    def traffic(self, metadata: PlanMetadata, itemsize: int) -> Traffic:
        """A row per token and rank out, with each pick's code; a row per pick back, and in backward."""
        picks, row_bytes = metadata.plan.pick_splits, metadata.dim * itemsize
        sent, returned = sum(metadata.plan.copy_splits.sent), sum(picks.received)
        return Traffic(sent, sent * row_bytes + 4 * sum(picks.sent), returned, returned * row_bytes)


@torch.no_grad()
def make_plan(routing: Routing, ep_mesh: DeviceMesh, num_experts: int) -> tuple[Plan, torch.Tensor]:
    """The plan, and the rows of each local expert. One count exchange, the host sync, and one of picks."""
    ids_TK, ep_size, num_local = routing.topk_expert_ids_TK, ep_mesh.size(), num_experts // ep_mesh.size()
    rank_TK = ids_TK // num_local
    goes_TS = _ranks_of(rank_TK, routing.present_TK, ep_size)
    counts = exchange_counts(routing.num_tokens_per_expert_E, ep_mesh, goes_TS.sum(0))
    ranks_S = torch.arange(ep_size, device=ids_TK.device)
    picks = slots_by_key(rank_TK, routing.present_TK, counts.num_rows_sent)
    is_first_N = _is_first(rank_TK.flatten().index_select(0, picks.order_N), picks.token_N)
    # One int32 per pick: its expert on that rank, and whether it is the first of its row.
    expert_N = (ids_TK % num_local).flatten().index_select(0, picks.order_N)
    code_R = exchange_rows((2 * expert_N + is_first_N).to(torch.int32), counts.rows, ep_mesh)
    arrived = slots_by_key((code_R // 2).unsqueeze(1))
    plan = Plan(
        copies=slots_by_key(ranks_S.expand_as(goes_TS), goes_TS, sum(counts.copies.sent)),
        copy_splits=counts.copies,
        picks=picks,
        pick_splits=counts.rows,
        arrived=arrived,
        experts=_grid(code_R % 2, arrived, sum(counts.copies.received), ids_TK.shape[1]),
    )
    return plan, counts.num_tokens_Se.sum(0)


def _send_scores(scores_TK: torch.Tensor, plan: Plan, ep_mesh: DeviceMesh) -> torch.Tensor:
    """Each pick's score to the rank that owns its expert: (T, K) to (U, K). Differentiable."""
    scores_N1 = gather_rows(scores_TK.reshape(-1, 1), plan.picks.ungrouped)
    scores_R1 = exchange_rows(scores_N1, plan.pick_splits, ep_mesh)
    scores_UK = sum_rows(gather_rows(scores_R1, plan.arrived), plan.experts.ungrouped)
    return scores_UK.view_as(plan.experts.place_TK)


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


def _grid(is_first_R: torch.Tensor, arrived: Slots, num_copies: int, top_k: int) -> Slots:
    """The arrived picks as rows drawn from a (U, K) grid: the k-th pick of a row is in column k."""
    row_R = is_first_R.cumsum(0) - 1
    column_R = torch.arange(row_R.shape[0], device=row_R.device) - torch.searchsorted(row_R, row_R)
    number_R = row_R * top_k + column_R
    place = number_R.new_zeros(num_copies * top_k).scatter_(0, number_R, arrived.place_TK.flatten())
    present = torch.zeros_like(place, dtype=torch.bool).index_fill_(0, number_R, True)
    return Slots(number_R.index_select(0, arrived.order_N), place.view(-1, top_k), present.view(-1, top_k))
