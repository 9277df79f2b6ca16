"""Matmuls of many experts at once: each expert's rows times its own matrix.

The legend is in ``titan_moe/layer/moe.py``.
"""

import torch


def grouped_mm(x_RD: torch.Tensor, w_eDF: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
    """``(R, F)``: the rows of each expert times its matrix."""
    if x_RD.dtype != torch.float64:
        return torch._grouped_mm(x_RD, w_eDF, offs=offsets_e)
    # What torch lacks in fp64: e times the work, no host sync; for proofs.
    y_RF = x_RD.new_zeros(x_RD.shape[0], w_eDF.shape[-1])
    for expert_R1, w_DF in zip(_rows_by_expert(x_RD, offsets_e), w_eDF.unbind(), strict=True):
        y_RF = torch.where(expert_R1, x_RD @ w_DF, y_RF)
    return y_RF


def outer_products(y_RF: torch.Tensor, x_RD: torch.Tensor, offsets_e: torch.Tensor) -> torch.Tensor:
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
