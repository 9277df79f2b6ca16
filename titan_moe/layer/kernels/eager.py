"""What each kernel computes, in plain torch ops: the reference, and the fallback on any device and dtype.

The legend is in ``titan_moe/layer/moe.py``. acc is fp32, or fp64 for fp64 rows; each ``+`` and ``*`` rounds
in acc.
"""

import torch
import torch.nn.functional as F


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for what is narrower."""
    return torch.promote_types(dtype, torch.float32)


def sum_rows(
    y_ND: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
    also_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(T, D)``: row ``place[t, 0]`` plus ``place[t, 1]`` ... in acc and in that order, rounded once.

    Where not present, the place counts as a row of zeros, whatever (NaN) stands there. The rows are
    those of ``y + also``, rounded to their dtype, if also is given.
    """
    top_k = place_TK.shape[1]
    if also_ND is not None:
        y_ND = y_ND + also_ND
    y_ND = _with_a_row(y_ND, present_TK)
    acc = accumulation_dtype(y_ND.dtype) if top_k > 1 else y_ND.dtype
    sum_TD = _of_slot(y_ND, place_TK, present_TK, 0, acc)
    for k in range(1, top_k):
        sum_TD = sum_TD + _of_slot(y_ND, place_TK, present_TK, k, acc)
    return sum_TD.to(y_ND.dtype)


def weighted_sum(
    y_ND: torch.Tensor,
    scores_TK: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """``sum_rows`` of ``y[place[t, k]] * scores[t, k]``, both in acc, from a sum of 0."""
    acc = accumulation_dtype(y_ND.dtype)
    y_ND = _with_a_row(y_ND, present_TK)
    sum_TD = y_ND.new_zeros((scores_TK.shape[0], y_ND.shape[1]), dtype=acc)
    for k, score_T in enumerate(scores_TK.to(acc).unbind(1)):
        sum_TD = sum_TD + _of_slot(y_ND, place_TK, present_TK, k, acc, score_T.unsqueeze(1))
    return sum_TD.to(y_ND.dtype)


def weighted_sum_backward(
    grad_TD: torch.Tensor, y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(N, D)`` gradient of the rows, rounded once, and ``(N,)`` gradient of their scores, in acc.

    With slot ``i = order[n]`` of token ``t = i // K``: ``grad[t] * scores[i]``, and the dot product
    ``grad[t] . y[n]`` (its order of summation is a kernel's own, the same for every row).
    """
    acc = accumulation_dtype(y_ND.dtype)
    grad_acc_ND = grad_TD.index_select(0, order_N // scores_TK.shape[1]).to(acc)
    scores_N1 = scores_TK.flatten().index_select(0, order_N).to(acc).unsqueeze(1)
    return (grad_acc_ND * scores_N1).to(y_ND.dtype), (grad_acc_ND * y_ND.to(acc)).sum(-1)


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` in acc, rounded once."""
    acc = accumulation_dtype(gate_RF.dtype)
    return (F.silu(gate_RF.to(acc)) * up_RF.to(acc)).to(gate_RF.dtype)


def swiglu_backward(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, each rounded once.

    With ``s = sigmoid(gate)``: ``grad * up * s * (1 + gate * (1 - s))`` and ``grad * gate * s``.
    """
    acc = accumulation_dtype(gate_RF.dtype)
    grad, gate, up = (tensor_RF.to(acc) for tensor_RF in (grad_RF, gate_RF, up_RF))
    s = torch.sigmoid(gate)
    grad_gate_RF = (grad * up) * (s * (1 + gate * (1 - s)))
    return grad_gate_RF.to(gate_RF.dtype), (grad * (gate * s)).to(gate_RF.dtype)


def gate(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    """``(T, E)``: ``x @ w.T``, both in acc."""
    acc = accumulation_dtype(x_TD.dtype)
    return x_TD.to(acc) @ w_ED.to(acc).t()


def gate_backward(
    grad_TE: torch.Tensor, x_TD: torch.Tensor, w_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, rounded to its dtype, and of w, in acc."""
    acc = accumulation_dtype(x_TD.dtype)
    return (grad_TE @ w_ED.to(acc)).to(x_TD.dtype), grad_TE.t() @ x_TD.to(acc)


def _with_a_row(y_ND: torch.Tensor, present_TK: torch.Tensor | None) -> torch.Tensor:
    """One row more where slots may be absent: their place is 0, and there may be no rows at all."""
    return y_ND if present_TK is None else F.pad(y_ND, (0, 0, 0, 1))


def _of_slot(
    rows_ND: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None,
    k: int,
    acc: torch.dtype,
    score_T1: torch.Tensor | None = None,
) -> torch.Tensor:
    row_TD = rows_ND.index_select(0, place_TK[:, k]).to(acc)
    if score_T1 is not None:
        row_TD = row_TD * score_T1
    if present_TK is None:
        return row_TD
    # where, not a product: a row that is not there may hold NaN.
    return torch.where(present_TK[:, k].unsqueeze(1), row_TD, 0)
