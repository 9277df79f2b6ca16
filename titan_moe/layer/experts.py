"""The experts, and their computation as a step of autograd, which decides what is kept for backward.

The legend is in ``titan_moe/layer/moe.py``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torchtitan.models.common import moe as upstream

from titan_moe.layer.dispatch.base import RowSource
from titan_moe.layer.grouped_mm import grouped_mm, outer_products
from titan_moe.layer.kernels import ops as kernels

Save = Literal["all", "inputs"]


class GroupedExperts(upstream.GroupedExperts):
    """E SwiGLU experts as three grouped matmuls: ``w2 @ (silu(w1 @ x) * (w3 @ x))``.

    Computes in the dtype it is given (bf16 comes from FSDP's mixed precision). Runs for R == 0 like
    for any other R: an expert without rows gets an exact zero gradient, never None, so that no rank
    drops out of a reduction (NVIDIA/Megatron-LM#4851).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(upstream.GroupedExperts.Config):
        """torchtitan 0.3.0's fields: dim (D), hidden_dim (F), num_experts (E); and ``[moe] save``."""

        save: Save = "all"  # what is kept for backward; see swiglu_experts

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.save: Save = config.save

    def forward(  # pyrefly: ignore[bad-override]  (one parameter more)
        self, x_RD: torch.Tensor, num_tokens_per_expert_e: torch.Tensor, source: RowSource | None = None
    ) -> torch.Tensor:
        """Returns ``(R, D)``, in the order of the rows given.

        Args:
            x_RD: expert-major rows without padding, in the dtype of the weights.
            num_tokens_per_expert_e: int64 rows per local expert, sums to R.
            source: what x_RD was gathered from, if that is to be kept for backward instead of x_RD.
        """
        offsets_e = num_tokens_per_expert_e.cumsum(0, dtype=torch.int32)
        w1_eFD, w2_eDF, w3_eFD = (_local(weight) for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        if getattr(self._grouped_mm, "__func__", None) is GroupedExperts._grouped_mm:
            return swiglu_experts(x_RD, offsets_e, w1_eFD, w2_eDF, w3_eFD, source, self.save)
        gate_RF = self._grouped_mm(A=x_RD, B_t=w1_eFD.transpose(-2, -1), offs=offsets_e)
        up_RF = self._grouped_mm(A=x_RD, B_t=w3_eFD.transpose(-2, -1), offs=offsets_e)
        return self._grouped_mm(A=swiglu(gate_RF, up_RF), B_t=w2_eDF.transpose(-2, -1), offs=offsets_e)

    def _grouped_mm(self, *, A: torch.Tensor, B_t: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        """``A[rows of e] @ B_t[e]`` per expert e; torchtitan's seam: an override brings its own backward."""
        return grouped_mm(A, B_t, offs)


def _local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's shard of an expert weight; its gradient has the weight's own placements."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def swiglu_experts(
    x_RD: torch.Tensor,
    offsets_e: torch.Tensor,
    w1_eFD: torch.Tensor,
    w2_eDF: torch.Tensor,
    w3_eFD: torch.Tensor,
    source: RowSource | None = None,
    save: Save = "all",
) -> torch.Tensor:
    """``(R, D)``: ``w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x))`` for the rows of each expert e.

    Args:
        offsets_e: int32, the number of the row behind each expert's last one.
        source: what x_RD was gathered from. It is kept in place of x_RD, gathered again in backward, and
            given the gradient that x_RD would get.
        save: what else is kept for backward. "all" keeps what the matmuls and the activation made. "inputs"
            keeps nothing of it, and two of the nine matmuls run again.
    """
    origin = (None,) * len(RowSource._fields) if source is None else source
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
        grad_w1 = outer_products(grads_RF.pop(0), x_RD, offsets_e) if wants_w1 else None
        grad_w3 = outer_products(grads_RF.pop(), x_RD, offsets_e) if wants_w3 else None
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
        grad_w2 = outer_products(grad_RD, kernels.swiglu(gate_RF, up_RF), offsets_e) if wants_w2 else None
        del grad_RD
        grads_RF = list(kernels.swiglu_backward(grad_h_RF, gate_RF, up_RF))
        del grad_h_RF, gate_RF, up_RF
        wanted = wants_x or wants_rows
        grad_x = _grad_of_rows(grads_RF, w1_eFD, w3_eFD, offsets_e, *kept[2:]) if wanted else None
        grad_w1 = outer_products(grads_RF.pop(0), x_RD, offsets_e) if wants_w1 else None
        grad_w3 = outer_products(grads_RF.pop(), x_RD, offsets_e) if wants_w3 else None
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
    """RowSource's fields; the rows themselves where they came from nowhere."""
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
