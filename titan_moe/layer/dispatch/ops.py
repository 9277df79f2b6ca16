"""Permutations and their exact backward, shared by the dispatchers. The legend is in ``moe.py``.

A permutation is known, so its backward is a gather: no atomics, no accumulating scatter, the same
bits each time. Sums run over the slots of a token in slot order, in fp32 (fp64 for fp64), rounded once.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from titan_moe.layer.dispatch.base import RowSource
from titan_moe.layer.kernels import ops as kernels


class Slots(NamedTuple):
    """N rows drawn from a (T, K) grid of slots, K per token; slot (t, k) has the number ``t * K + k``.

    Attributes:
        order_N: int64, the slot behind each row.
        place_TK: int64, the row of each slot; 0 where the slot has no row, also when no slot has one.
        present_TK: bool, which slots have a row; None when all do.
    """

    order_N: torch.Tensor
    place_TK: torch.Tensor
    present_TK: torch.Tensor | None = None

    @property
    def token_N(self) -> torch.Tensor:
        """The token behind each row."""
        top_k = self.place_TK.shape[1]
        return self.order_N if top_k == 1 else self.order_N // top_k

    @property
    def ungrouped(self) -> "Slots":
        """The same rows, each slot a token of its own: a (T * K, 1) grid."""
        present_TK = self.present_TK
        present_N1 = None if present_TK is None else present_TK.view(-1, 1)
        return Slots(self.order_N, self.place_TK.view(-1, 1), present_N1)

    def source(self, rows_TD: torch.Tensor) -> RowSource:
        """What the rows that ``gather_rows`` makes were gathered from."""
        return RowSource(rows_TD, self.token_N, self.place_TK, self.present_TK)


def slots_by_key(
    key_TK: torch.Tensor, present_TK: torch.Tensor | None = None, num_rows: int | None = None
) -> Slots:
    """The slots as rows, ordered by key, inside a key by slot number (stable).

    Args:
        key_TK: integers; any value where a slot is not present.
        present_TK: bool: the slots that become rows; None: all T * K.
        num_rows: how many they are, where the host knows it; otherwise asking costs a host sync.
    """
    if present_TK is None:
        order_N = torch.argsort(key_TK.flatten(), stable=True)
        return Slots(order_N, _invert(order_N).view_as(key_TK))
    order_N, place_TK, _ = slots_by_key(torch.where(present_TK, key_TK, torch.iinfo(key_TK.dtype).max))
    if num_rows is None:
        num_rows = int(present_TK.sum())
    return Slots(order_N[:num_rows], torch.where(present_TK, place_TK, 0), present_TK)


def rank_to_expert_major(num_tokens_Se: torch.Tensor, num_rows: int) -> Slots:
    """Received rows, (source rank, expert) major, as rows in (expert, source rank) order: K is 1.

    Args:
        num_tokens_Se: ``(S source ranks, e)`` int64: rows received per source rank and local expert.
        num_rows: R, its sum, known on the host already.
    """
    num_experts = num_tokens_Se.shape[1]
    expert_Se = torch.arange(num_experts, device=num_tokens_Se.device).expand_as(num_tokens_Se)
    expert_R = expert_Se.reshape(-1).repeat_interleave(num_tokens_Se.reshape(-1), output_size=num_rows)
    return slots_by_key(expert_R.unsqueeze(1))


def gather_rows(x_TD: torch.Tensor, slots: Slots) -> torch.Tensor:
    """``(N, D)``: each row its token. Backward is ``sum_rows``."""
    return _GatherRows.apply(x_TD, *slots)


def sum_rows(y_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
    """``(T, D)``: the sum of each token's rows, in slot order. Backward is ``gather_rows``."""
    return _SumRows.apply(y_ND, *slots)


def weighted_sum(y_ND: torch.Tensor, scores_TK: torch.Tensor, slots: Slots) -> torch.Tensor:
    """``(T, D)``: the sum over k of ``scores[t, k]`` times the row of slot (t, k), in slot order.

    Backward gives the rows' gradient as a gather and the scores' as a row dot product, both computed
    in the accumulation dtype; a slot without a row gets a zero.
    """
    return _WeightedSum.apply(y_ND, scores_TK, *slots)


def _invert(order_N: torch.Tensor) -> torch.Tensor:
    places_N = torch.arange(order_N.numel(), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, places_N)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*slots)
        return x_TD.index_select(0, Slots(*slots).token_N)

    @staticmethod
    @once_differentiable  # its type loses the parameter's name
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = grads
        _, place_TK, present_TK = ctx.saved_tensors
        return kernels.sum_rows(grad_ND, place_TK, present_TK), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*slots)
        _, place_TK, present_TK = slots
        return kernels.sum_rows(y_ND, place_TK, present_TK)

    @staticmethod
    @once_differentiable  # its type loses the parameter's name
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TD,) = grads
        return grad_TD.index_select(0, Slots(*ctx.saved_tensors).token_N), None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, scores_TK: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y_ND, scores_TK, *slots)
        _, place_TK, present_TK = slots
        return kernels.weighted_sum(y_ND, scores_TK, place_TK, present_TK)

    @staticmethod
    @once_differentiable  # its type loses the parameter's name
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TD,) = grads
        y_ND, scores_TK, order_N, place_TK, present_TK = ctx.saved_tensors
        grad_y_ND, grad_score_N = kernels.weighted_sum_backward(grad_TD, y_ND, scores_TK, order_N)
        if present_TK is None:
            grad_slots = grad_score_N.index_select(0, place_TK.flatten())
        else:  # a slot without a row has no place to read from
            grad_slots = grad_score_N.new_zeros(scores_TK.numel()).index_copy_(0, order_N, grad_score_N)
        return grad_y_ND, grad_slots.view_as(scores_TK).to(scores_TK.dtype), None, None, None
