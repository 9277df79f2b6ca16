"""Permutations and their exact backward, shared by the dispatchers. The legend is in ``moe.py``.

A permutation is known, so its backward is a gather: no atomics, no accumulating scatter, the same
bits each time. Sums run over the slots of a token in slot order, in fp32 (fp64 for fp64), rounded once.
"""

from typing import Any, NamedTuple

import torch


class Slots(NamedTuple):
    """N rows drawn from a (T, K) grid of slots, K per token; slot (t, k) has the number ``t * K + k``.

    Attributes:
        order_N: int64, the slot behind each row.
        place_TK: int64, the row of each slot; any number in range where the slot has no row.
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

    def of_slot(self, rows_ND: torch.Tensor, k: int, dtype: torch.dtype) -> torch.Tensor:
        """``(T, D)``: the row of each token's slot k in ``dtype``, 0 where it has none."""
        row_TD = rows_ND.index_select(0, self.place_TK[:, k]).to(dtype)
        if self.present_TK is None:
            return row_TD
        # where, not a product: a row that is not there may hold NaN.
        return torch.where(self.present_TK[:, k].unsqueeze(1), row_TD, 0)


def slots_by_key(
    key_TK: torch.Tensor, present_TK: torch.Tensor | None = None, num_rows: int | None = None
) -> Slots:
    """The slots as rows, ordered by key, inside a key by slot number (stable).

    Args:
        key_TK: integers; any value where a slot is not present.
        present_TK: bool: the slots that become rows; None: all T * K.
        num_rows: how many they are, where the host knows; else asking costs a host sync.
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


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_over_slots(rows_ND: torch.Tensor, slots: Slots) -> torch.Tensor:
    top_k = slots.place_TK.shape[1]
    acc = _accumulation_dtype(rows_ND.dtype) if top_k > 1 else rows_ND.dtype
    sum_TD = slots.of_slot(rows_ND, 0, acc)
    for k in range(1, top_k):
        sum_TD = sum_TD + slots.of_slot(rows_ND, k, acc)
    return sum_TD.to(rows_ND.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*slots)
        return x_TD.index_select(0, Slots(*slots).token_N)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = grads
        return _sum_over_slots(grad_ND, Slots(*ctx.saved_tensors)), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*slots)
        return _sum_over_slots(y_ND, Slots(*slots))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TD,) = grads
        return grad_TD.index_select(0, Slots(*ctx.saved_tensors).token_N), None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_ND: torch.Tensor, scores_TK: torch.Tensor, *slot_tensors: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(y_ND, scores_TK, *slot_tensors)
        slots, acc = Slots(*slot_tensors), _accumulation_dtype(y_ND.dtype)
        sum_TD = y_ND.new_zeros((scores_TK.shape[0], y_ND.shape[1]), dtype=acc)
        for k, score_T in enumerate(scores_TK.to(acc).unbind(1)):
            sum_TD = sum_TD + slots.of_slot(y_ND, k, acc) * score_T.unsqueeze(1)
        return sum_TD.to(y_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_TD,) = grads
        y_ND, scores_TK, *slot_tensors = ctx.saved_tensors
        slots, acc = Slots(*slot_tensors), _accumulation_dtype(y_ND.dtype)
        grad_acc_ND = grad_TD.index_select(0, slots.token_N).to(acc)
        scores_N1 = scores_TK.flatten().index_select(0, slots.order_N).to(acc).unsqueeze(1)
        grad_y_ND = (grad_acc_ND * scores_N1).to(y_ND.dtype)
        grad_score_N = (grad_acc_ND * y_ND.to(acc)).sum(-1)
        grad_scores_TK = grad_score_N.index_select(0, slots.place_TK.flatten()).view_as(scores_TK)
        if slots.present_TK is not None:
            grad_scores_TK = torch.where(slots.present_TK, grad_scores_TK, 0)
        return grad_y_ND, grad_scores_TK.to(scores_TK.dtype), None, None, None
