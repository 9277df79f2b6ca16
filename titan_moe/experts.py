"""The experts' computation as one step of autograd, which decides what to keep for backward.

The legend is in ``titan_moe/moe.py``.
"""

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

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
        source: what x_RD was gathered from: kept in its place, gathered again in backward, and given the
            gradient that would be x_RD's.
        save: what else is kept. all: what the matmuls and the activation made. inputs: nothing; two of the
            nine matmuls run again.
    """
    origin = (None,) * len(Source._fields) if source is None else source
    if source is not None:
        x_RD = x_RD.detach()
    if save == "inputs":
        return _FromInputs.apply(x_RD, offsets_e, w1_eFD, w2_eDF, w3_eFD, *origin)
    # One node each, because autograd frees what a node saved as soon as the node is done.
    gate_RF, up_RF = _GateAndUp.apply(x_RD, offsets_e, w1_eFD, w3_eFD, *origin)
    return grouped_mm(swiglu(gate_RF, up_RF), w2_eDF.transpose(-2, -1), offsets_e)


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
    """``(R, F)``: ``silu(gate) * up`` in fp32 (fp64 for fp64), rounded once; so is each gradient."""
    return _SwiGLU.apply(gate_RF, up_RF)


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


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_RF, up_RF)
        return kernels.swiglu(gate_RF, up_RF)

    @staticmethod
    @once_differentiable  # its type loses the parameter's name
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return kernels.swiglu_backward(*grads, *ctx.saved_tensors)


class _GateAndUp(torch.autograd.Function):
    boxed_grads_call = True  # backward may let go of its arguments

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        offsets_e: torch.Tensor,
        w1_eFD: torch.Tensor,
        w3_eFD: torch.Tensor,
        *origin: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(offsets_e, w1_eFD, w3_eFD, *_kept(x_RD, origin))
        return _gate_and_up(x_RD, w1_eFD, w3_eFD, offsets_e)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grads_RF = _unboxed(grads)
        offsets_e, w1_eFD, w3_eFD, *kept = ctx.saved_tensors
        wants_x, _, wants_w1, wants_w3, wants_rows, *_ = ctx.needs_input_grad
        # First, because the weights' gradients stay.
        wanted = wants_x or wants_rows
        grad_x = _grad_of_rows(grads_RF, w1_eFD, w3_eFD, offsets_e, *kept[2:]) if wanted else None
        x_RD = _again(*kept[:2])
        grad_w1 = _outer_products(grads_RF.pop(0), x_RD, offsets_e) if wants_w1 else None
        grad_w3 = _outer_products(grads_RF.pop(), x_RD, offsets_e) if wants_w3 else None
        to_x, to_rows = (grad_x, None) if wants_x else (None, grad_x)
        return to_x, None, grad_w1, grad_w3, to_rows, None, None, None


class _FromInputs(torch.autograd.Function):
    boxed_grads_call = True

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        offsets_e: torch.Tensor,
        w1_eFD: torch.Tensor,
        w2_eDF: torch.Tensor,
        w3_eFD: torch.Tensor,
        *origin: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(offsets_e, w1_eFD, w2_eDF, w3_eFD, *_kept(x_RD, origin))
        h_RF = kernels.swiglu(*_gate_and_up(x_RD, w1_eFD, w3_eFD, offsets_e))
        return grouped_mm(h_RF, w2_eDF.transpose(-2, -1), offsets_e)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        grads_RD = _unboxed(grads)
        offsets_e, w1_eFD, w2_eDF, w3_eFD, *kept = ctx.saved_tensors
        wants_x, _, wants_w1, wants_w2, wants_w3, wants_rows, *_ = ctx.needs_input_grad
        x_RD = _again(*kept[:2])
        gate_RF, up_RF = _gate_and_up(x_RD, w1_eFD, w3_eFD, offsets_e)
        grad_RD = grads_RD.pop().contiguous()
        grad_h_RF = grouped_mm(grad_RD, w2_eDF, offsets_e)
        grad_w2 = _outer_products(grad_RD, kernels.swiglu(gate_RF, up_RF), offsets_e) if wants_w2 else None
        del grad_RD
        grads_RF = list(kernels.swiglu_backward(grad_h_RF, gate_RF, up_RF))
        del grad_h_RF, gate_RF, up_RF
        wanted = wants_x or wants_rows
        grad_x = _grad_of_rows(grads_RF, w1_eFD, w3_eFD, offsets_e, *kept[2:]) if wanted else None
        grad_w1 = _outer_products(grads_RF.pop(0), x_RD, offsets_e) if wants_w1 else None
        grad_w3 = _outer_products(grads_RF.pop(), x_RD, offsets_e) if wants_w3 else None
        to_x, to_rows = (grad_x, None) if wants_x else (None, grad_x)
        return to_x, None, grad_w1, grad_w2, grad_w3, to_rows, None, None, None


def _unboxed(grads: tuple[Any, ...]) -> list[torch.Tensor]:
    """The gradients as a list to take from; torch.compile hands them over without the box.

    Raises:
        RuntimeError: a graph of this backward is wanted; once_differentiable does not look into the box.
    """
    unboxed = grads[0] if isinstance(grads[0], list) else list(grads)
    if torch.is_grad_enabled() and any(grad.requires_grad for grad in unboxed):
        raise RuntimeError("the experts have no second derivative: leave create_graph out")
    return unboxed


def _kept(x_RD: torch.Tensor, origin: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Source's fields; the rows themselves where they came from nowhere."""
    return origin if origin[0] is not None else (x_RD, None, None, None)


def _again(rows_XD: torch.Tensor, index_R: torch.Tensor | None) -> torch.Tensor:
    return rows_XD if index_R is None else rows_XD.index_select(0, index_R)


def _gate_and_up(
    x_RD: torch.Tensor, w1_eFD: torch.Tensor, w3_eFD: torch.Tensor, offsets_e: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        grouped_mm(x_RD, w1_eFD.transpose(-2, -1), offsets_e),
        grouped_mm(x_RD, w3_eFD.transpose(-2, -1), offsets_e),
    )


def _grad_of_rows(
    grads_RF: list[torch.Tensor],
    w1_eFD: torch.Tensor,
    w3_eFD: torch.Tensor,
    offsets_e: torch.Tensor,
    place_TK: torch.Tensor | None,
    present_TK: torch.Tensor | None,
) -> torch.Tensor:
    """``(R, D)``: gate's part plus up's, each rounded, and the sum. With places ``(T, D)``: each token's."""
    gate_RD = grouped_mm(grads_RF[0], w1_eFD, offsets_e)
    up_RD = grouped_mm(grads_RF[1], w3_eFD, offsets_e)
    if place_TK is None:
        return gate_RD.add_(up_RD)
    return kernels.sum_rows(gate_RD, place_TK, present_TK, up_RD)
