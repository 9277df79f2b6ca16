"""DeepEP's idea on plain c10d collectives: one row per token and rank, instead of one per expert.

A token goes once to each rank that owns at least one of its K experts, with its expert ids, and is copied
to the experts there (deepseek-ai/DeepEP). Under uniform routing over S ranks that is
``S * (1 - C(E - E/S, K) / C(E, K))`` rows per token where all_to_all sends K.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
    present_slots_by_key,
    rank_to_expert_major,
    slots_by_key,
    sum_rows,
    weighted_sum,
)


class Plan(NamedTuple):
    """Which rows go where. M rows leave this rank, U arrive, and become R rows for the local experts.

    Attributes:
        copies: the M rows as slots of a (T, S ranks) grid: ordered by rank, inside a rank by token.
        copy_splits: M and U by rank.
        experts: the R rows as slots of the arrived (U, K) grid, expert-major.
        sent: the N routed slots by expert, as all_to_all would send them.
        received: the R rows by source rank, as all_to_all would receive them.
        row_splits: N and R by rank.
    """

    copies: Slots
    copy_splits: Splits
    experts: Slots
    sent: Slots
    received: Slots
    row_splits: Splits


@dataclass(frozen=True, kw_only=True)
class DeepEPMetadata(DispatchMetadata):
    """``scores`` are per arrived row, (U, K), under per_rank, and per token, (T, K), under per_slot."""

    plan: Plan
    scores: torch.Tensor


class DeepEPDispatcher(TokenDispatcher[DeepEPMetadata]):
    """Works on any c10d backend.

    ``per_rank``: the expert's rank weighs and sums a token's rows in fp32 and returns one row, rounded to
    the rows' dtype; fewest bytes, one rounding more per rank. ``per_slot``: it returns all K rows, forward
    and backward; the bytes of all_to_all on that way, and its bits.
    """

    requires_ep = True
    needs_host_sync = True
    variants = ({"combine": "per_rank"}, {"combine": "per_slot"})

    @dataclass(kw_only=True, slots=True)
    class Config(TokenDispatcher.Config):
        """``[moe.deepep]``."""

        combine: Literal["per_rank", "per_slot"] = "per_rank"

        def validate(self, limits: DispatchLimits) -> None:
            """Refuses experts that do not divide evenly over the EP ranks."""
            if limits.num_experts % limits.ep_size:
                raise ValueError(
                    f"num_experts ({limits.num_experts}) must be divisible by "
                    f"parallelism.expert_parallel_degree ({limits.ep_size})"
                )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.per_slot = config.combine == "per_slot"
        self.bitwise_equal_to = "local" if self.per_slot else None
        self.ep_mesh: DeviceMesh | None = None

    def bind(self, ep_mesh: DeviceMesh | None, limits: DispatchLimits) -> None:
        """Keeps the mesh whose ranks share the experts, rank r owning ids ``[r * e, (r + 1) * e)``."""
        if ep_mesh is None:
            raise ValueError("the deepep dispatcher needs an EP mesh; use 'all_to_all' or 'local' without EP")
        self.ep_mesh = ep_mesh

    def dispatch(
        self, x_TD: torch.Tensor, routing: Routing, layout: DispatchMetadata
    ) -> Dispatched[DeepEPMetadata]:
        """See the contract in ``base``. One count exchange, one host sync."""
        plan, counts_e = self._plan(routing)
        if self.per_slot:
            x_RD = _SendOnceReturnEach.apply(x_TD, plan, self.ep_mesh)
            scores = routing.topk_scores_TK
        else:
            x_RD = gather_rows(self._send(x_TD, plan), plan.experts)
            scores = self._send(routing.topk_scores_TK, plan)
        return Dispatched(x_RD, counts_e, DeepEPMetadata.extend(layout, plan=plan, scores=scores))

    def combine(self, y_RD: torch.Tensor, metadata: DeepEPMetadata) -> torch.Tensor:
        """See the contract in ``base``; under per_rank, with one more rounding per rank."""
        plan = metadata.plan
        if self.per_slot:
            y_ND = exchange_rows(sum_rows(y_RD, plan.received), plan.row_splits.back(), self.ep_mesh)
            return weighted_sum(y_ND, metadata.scores, plan.sent)
        z_UD = weighted_sum(y_RD, metadata.scores, plan.experts)
        return sum_rows(exchange_rows(z_UD, plan.copy_splits.back(), self.ep_mesh), plan.copies)

    def _send(self, rows: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Each token's row to each rank that needs it: (T, ...) to (U, ...)."""
        return exchange_rows(gather_rows(rows, plan.copies), plan.copy_splits, self.ep_mesh)

    @torch.no_grad()
    def _plan(self, routing: Routing) -> tuple[Plan, torch.Tensor]:
        assert self.ep_mesh is not None, "bind comes first"
        ids_TK, ep_size = routing.topk_expert_ids_TK, self.ep_mesh.size()
        num_local = self.num_experts // ep_size
        ranks_S = torch.arange(ep_size, device=ids_TK.device)
        goes_TS = ids_TK.new_zeros(ids_TK.shape[0], ep_size, dtype=torch.bool)
        goes_TS = goes_TS.scatter_(1, ids_TK // num_local, True)
        counts = exchange_counts(routing.num_tokens_per_expert_E, self.ep_mesh, goes_TS.sum(0))
        copies = present_slots_by_key(ranks_S.expand_as(goes_TS), goes_TS, sum(counts.copies.sent))
        ids_MK = ids_TK.index_select(0, copies.token_N).to(torch.int32)
        first = self.ep_mesh.get_local_rank() * num_local
        local_UK = exchange_rows(ids_MK, counts.copies, self.ep_mesh) - first
        here_UK = (local_UK >= 0) & (local_UK < num_local)
        num_rows = sum(counts.rows.received)
        plan = Plan(
            copies=copies,
            copy_splits=counts.copies,
            experts=present_slots_by_key(local_UK, here_UK, num_rows),
            sent=slots_by_key(ids_TK),
            received=rank_to_expert_major(counts.num_tokens_Se, num_rows),
            row_splits=counts.rows,
        )
        return plan, counts.num_tokens_Se.sum(0)


class _SendOnceReturnEach(torch.autograd.Function):
    """Forward sends a token once per rank; backward returns the gradient of each of its K rows.

    The gradients are then summed where all_to_all sums them: in slot order, on the token's own rank.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, plan: Plan, ep_mesh: DeviceMesh) -> torch.Tensor:
        ctx.plan, ctx.ep_mesh = plan, ep_mesh
        x_UD = exchange_rows(gather_rows(x_TD, plan.copies), plan.copy_splits, ep_mesh)
        return gather_rows(x_UD, plan.experts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_RD,) = grads
        plan: Plan = ctx.plan
        grad_ND = exchange_rows(sum_rows(grad_RD, plan.received), plan.row_splits.back(), ctx.ep_mesh)
        return sum_rows(grad_ND, plan.sent), None, None
