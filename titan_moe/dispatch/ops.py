"""Permutations and their exact backward, shared by the dispatchers. The legend is in ``moe.py``.

A permutation is known, so its backward is a gather: no atomics, no accumulating scatter, the same
bits each time. Sums run over the K slots in slot order, in fp32 (fp64 for fp64), rounded once.
"""

from typing import Any

import torch


def expert_order(topk_expert_ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts the N = T*K routed slots by expert, by token inside an expert.

    Returns:
        order_N: int64, the slot ``t * K + k`` that sits at each sorted place.
        place_TK: int64, its inverse: the sorted place of each slot.
    """
    order_N = torch.argsort(topk_expert_ids_TK.flatten(), stable=True)
    return order_N, invert(order_N).view_as(topk_expert_ids_TK)


def invert(order_N: torch.Tensor) -> torch.Tensor:
    """The inverse permutation: ``invert(order)[order[i]] == i``."""
    places_N = torch.arange(order_N.numel(), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, places_N)


def rank_to_expert_major(num_tokens_Se: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reordering of received rows from (source rank, expert) to (expert, source rank) major.

    Args:
        num_tokens_Se: ``(S source ranks, e)`` int64: rows received per source rank and local expert.
        num_rows: R, its sum, known on the host already.

    Returns:
        order_R: int64; ``rows[order_R]`` is expert-major, inside an expert by source rank.
        place_R: int64, its inverse.
    """
    num_experts = num_tokens_Se.shape[1]
    expert_of_segment = torch.arange(num_experts, device=num_tokens_Se.device).expand_as(num_tokens_Se)
    expert_R = expert_of_segment.reshape(-1).repeat_interleave(
        num_tokens_Se.reshape(-1), output_size=num_rows
    )
    order_R = torch.argsort(expert_R, stable=True)
    return order_R, invert(order_R)


def gather_rows(x_TD: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """``(N, D)``: row ``order_N[i] // K`` of ``x_TD`` at each place i; K = 1 reorders rows.

    Backward sums the K gradients of a token in slot order.
    """
    return _GatherRows.apply(x_TD, order_N, place_TK)


def weighted_sum(
    y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor
) -> torch.Tensor:
    """``(T, D)``: ``sum_k scores[t, k] * y[place[t, k]]`` in slot order, rounded once to y's dtype.

    Backward gives the rows' gradient as a gather and the scores' as a row dot product, both computed
    in the accumulation dtype.
    """
    return _WeightedSum.apply(y_ND, scores_TK, order_N, place_TK)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_TK)
        top_k = place_TK.shape[1]
        return x_TD.index_select(0, order_N if top_k == 1 else order_N // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = grads
        (place_TK,) = ctx.saved_tensors
        grad_TD = grad_ND.index_select(0, place_TK[:, 0])
        if place_TK.shape[1] > 1:
            sum_TD = grad_TD.to(_accumulation_dtype(grad_ND.dtype))
            for place_T in place_TK[:, 1:].unbind(1):
                sum_TD = sum_TD + grad_ND.index_select(0, place_T)
            grad_TD = sum_TD.to(grad_ND.dtype)
        return grad_TD, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor, place_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y_ND, scores_TK, order_N, place_TK)
        acc = _accumulation_dtype(y_ND.dtype)
        sum_TD = y_ND.new_zeros((scores_TK.shape[0], y_ND.shape[1]), dtype=acc)
        for score_T, place_T in zip(scores_TK.unbind(1), place_TK.unbind(1), strict=True):
            sum_TD = sum_TD + y_ND.index_select(0, place_T).to(acc) * score_T.to(acc).unsqueeze(1)
        return sum_TD.to(y_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (grad_TD,) = grads
        y_ND, scores_TK, order_N, place_TK = ctx.saved_tensors
        top_k = place_TK.shape[1]
        acc = _accumulation_dtype(y_ND.dtype)
        grad_acc_ND = grad_TD.index_select(0, order_N // top_k).to(acc)
        scores_N1 = scores_TK.reshape(-1).index_select(0, order_N).to(acc).unsqueeze(1)
        grad_y_ND = (grad_acc_ND * scores_N1).to(y_ND.dtype)
        grad_score_N = (grad_acc_ND * y_ND.to(acc)).sum(-1)
        grad_scores_TK = grad_score_N.index_select(0, place_TK.reshape(-1)).view_as(scores_TK)
        return grad_y_ND, grad_scores_TK.to(scores_TK.dtype), None, None
