"""The experts' computation as one step of autograd, which decides what to keep for backward.

The legend is in ``titan_moe/moe.py``.
"""

from typing import Any, Literal

import torch

from titan_moe.dispatch.base import Source
from titan_moe.kernels import ops as kernels

Save = Literal["all", "inputs"]


def swiglu_experts(
    x_RD: torch.Tensor,
    offsets_e: torch.Tensor,
    w1_eFD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eFD: torch.Tensor,
    source: Source | None = None,
    save: Save = "all",
) -> torch.Tensor:
    """``(R, D)``: ``w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x))`` for the rows of each expert e.

    Args:
        offsets_e: int32: the row behind each expert's last.
        source: what x_RD was gathered from: kept in its place and gathered again in backward.
        save: what else is kept. all: what the grouped matmuls made. inputs: nothing; two of them run again.
    """
    return _SwiGLUExperts.apply(x_RD, offsets_e, w1_eFD, w2_eDF, w3_eFD, save, *(source or (None, None)))


def grouped_mm(x_RD: torch.Tensor, w_eDF: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """``(R, F)``: the rows of each expert times its matrix."""
    if x_RD.dtype != torch.float64:
        return torch._grouped_mm(x_RD, w_eDF, offs=offsets_e)
    # What torch lacks in fp64: e times the work, no host sync; for proofs.
    y_RF = x_RD.new_zeros(x_RD.shape[0], w_eDF.shape[-1])
    for expert_R1, w_DF in zip(_rows_by_expert(x_RD, offsets_e), w_eDF.unbind(), strict=True):
        y_RF = torch.where(expert_R1, x_RD @ w_DF, y_RF)
    return y_RF


def _outer_products(y_RF: torch.Tensor, x_RD: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """``(e, F, D)``: per expert the sum over its rows of ``outer(y, x)``; zeros where it has none."""
    if x_RD.dtype != torch.float64:
        return torch._grouped_mm(y_RF.t(), x_RD, offs=offsets_e)
    experts = _rows_by_expert(x_RD, offsets_e)
    return torch.stack(
        [torch.where(own_R1, y_RF, 0).t() @ torch.where(own_R1, x_RD, 0) for own_R1 in experts]
    )


def _rows_by_expert(rows_RD: torch.Tensor, offsets_e: torch.Tensor) -> list[torch.Tensor]:
    rows_R = torch.arange(rows_RD.shape[0], device=rows_RD.device)
    expert_R1 = torch.bucketize(rows_R, offsets_e, right=True).unsqueeze(1)
    return [expert_R1 == expert for expert in range(offsets_e.shape[0])]


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        offsets_e: torch.Tensor,
        w1_eFD: torch.Tensor,
        w2_eDF: torch.Tensor,
        w3_eFD: torch.Tensor,
        save: Save,
        *source: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_RF, up_RF = _gate_and_up(x_RD, w1_eFD, w3_eFD, offsets_e)
        h_RF = kernels.swiglu(gate_RF, up_RF)
        kept = (None, None, None) if save == "inputs" else (gate_RF, up_RF, h_RF)
        rows = (x_RD, None) if source[0] is None else source
        ctx.save_for_backward(offsets_e, w1_eFD, w2_eDF, w3_eFD, *rows, *kept)
        return grouped_mm(h_RF, w2_eDF.transpose(-2, -1), offsets_e)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_RD = grads[0].contiguous()
        offsets_e, w1_eFD, w2_eDF, w3_eFD, rows_XD, index_R, gate_RF, up_RF, h_RF = ctx.saved_tensors
        x_RD = rows_XD if index_R is None else rows_XD.index_select(0, index_R)
        if gate_RF is None:
            gate_RF, up_RF = _gate_and_up(x_RD, w1_eFD, w3_eFD, offsets_e)
            h_RF = kernels.swiglu(gate_RF, up_RF)
        wants_x, _, wants_w1, wants_w2, wants_w3, *_ = ctx.needs_input_grad
        grad_w2 = _outer_products(grad_RD, h_RF, offsets_e) if wants_w2 else None
        grad_h_RF = grouped_mm(grad_RD, w2_eDF, offsets_e)
        grad_gate_RF, grad_up_RF = kernels.swiglu_backward(grad_h_RF, gate_RF, up_RF)
        grad_w1 = _outer_products(grad_gate_RF, x_RD, offsets_e) if wants_w1 else None
        grad_w3 = _outer_products(grad_up_RF, x_RD, offsets_e) if wants_w3 else None
        grad_x_RD = None
        if wants_x:
            grad_x_RD = grouped_mm(grad_gate_RF, w1_eFD, offsets_e)
            grad_x_RD += grouped_mm(grad_up_RF, w3_eFD, offsets_e)
        return grad_x_RD, None, grad_w1, grad_w2, grad_w3, None, None, None


def _gate_and_up(
    x_RD: torch.Tensor, w1_eFD: torch.Tensor, w3_eFD: torch.Tensor, offsets_e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        grouped_mm(x_RD, w1_eFD.transpose(-2, -1), offsets_e),
        grouped_mm(x_RD, w3_eFD.transpose(-2, -1), offsets_e),
    )
