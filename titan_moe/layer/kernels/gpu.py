"""The kernels of eager.py for CUDA tensors, in Triton: one pass over memory each, no atomics, no autotuning.

An element is treated by its column and never by its row, so a row's bits do not depend on where in the
batch it stands. What a kernel is compiled for (the dtypes, K, D or F) is the same for all rows of a call.
bf16, fp16 and fp32 rows run here; others, or all with ``TITAN_MOE_KERNELS=eager``, run in ``eager``.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl

from titan_moe.layer.kernels import eager

BLOCK = 1024  # columns at a time: 16 bytes of bf16 per thread of 4 warps
# Without fusion a * b + c rounds twice, as in torch. (The interpreter drops these: numpy never fuses.)
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_ROW_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def sum_kernel(out, y, also, scores, place, present, D, K: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``[program 1]`` of row ``[program 0]`` of both sums; also, scores and present may be None."""
    t = tl.program_id(0).to(tl.int64)  # t * D may exceed 2^31
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        width = D
        if present is not None:
            width = tl.where(tl.load(present + slot) != 0, D, 0)  # nothing is read where there is no row
        here = columns < width
        at = tl.load(place + slot) * D + columns
        row = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
        if also is not None:
            more = tl.load(also + at, mask=here, other=0.0).to(tl.float32)
            row = (row + more).to(y.dtype.element_ty).to(tl.float32)
        if scores is not None:
            score = tl.load(scores + slot).to(tl.float32)
            total = total + tl.where(here, row * score, 0.0)
        elif k == 0:
            total = row  # itself: 0 + -0 would be +0
        else:
            total = total + row
    tl.store(out + t * D + columns, total.to(out.dtype.element_ty), mask=columns < D)


@triton.jit
def weighted_sum_backward_kernel(
    grad_y, grad_score, grad, y, scores, order, D, K: tl.constexpr, BLOCK: tl.constexpr
):
    """Row ``[program 0]``. The dot product: BLOCK partial sums, then their sum."""
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + n)
    score = tl.load(scores + slot).to(tl.float32)
    grad += slot // K * D
    dots = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, D, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < D
        value = tl.load(grad + columns, mask=inside, other=0.0).to(tl.float32)
        row = tl.load(y + n * D + columns, mask=inside, other=0.0).to(tl.float32)
        dots = dots + value * row
        tl.store(grad_y + n * D + columns, (value * score).to(grad_y.dtype.element_ty), mask=inside)
    tl.store(grad_score + n, tl.sum(dots, 0))


@triton.jit
def swiglu_kernel(out, gate, up, size, BLOCK: tl.constexpr):
    """Elements ``[program 0]`` of R * F."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + i, (value * tl.sigmoid(value) * other).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_gate, grad_up, grad, gate, up, size, BLOCK: tl.constexpr):
    """Elements ``[program 0]`` of R * F."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    g = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate + i, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(value)
    to_gate = (g * other) * (s * (1 + value * (1 - s)))
    tl.store(grad_gate + i, to_gate.to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + i, (g * (value * s)).to(grad_up.dtype.element_ty), mask=inside)


def sum_rows(
    y_ND: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
    also_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    """See eager; equal to it in every bit."""
    if not runs(y_ND):
        return eager.sum_rows(y_ND, place_TK, present_TK, also_ND)
    return _sum(y_ND, also_ND, None, place_TK, present_TK)


def weighted_sum(
    y_ND: torch.Tensor,
    scores_TK: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """See eager; equal to it in every bit. As in ``native``, an absent slot's score is not used either."""
    if not runs(y_ND):
        return eager.weighted_sum(y_ND, scores_TK, place_TK, present_TK)
    return _sum(y_ND, None, scores_TK, place_TK, present_TK)


def weighted_sum_backward(
    grad_TD: torch.Tensor, y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See eager; the rows equal to it in every bit."""
    if not runs(y_ND):
        return eager.weighted_sum_backward(grad_TD, y_ND, scores_TK, order_N)
    num_rows, dim = y_ND.shape
    grad_y_ND = torch.empty_like(y_ND, memory_format=torch.contiguous_format)
    grad_score_N = y_ND.new_empty(num_rows, dtype=torch.float32)
    tensors = (grad_y_ND, grad_score_N, grad_TD, y_ND, scores_TK, order_N)
    _launch(weighted_sum_backward_kernel, (num_rows,), *tensors, dim, scores_TK.shape[1])
    return grad_y_ND, grad_score_N


def swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
    """See eager; exp and the division are the GPU's fast ones: up to 1e-5 away, relatively, in fp32."""
    if not runs(gate_RF):
        return eager.swiglu(gate_RF, up_RF)
    h_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
    _launch(swiglu_kernel, (_blocks(h_RF.numel()),), h_RF, gate_RF, up_RF, h_RF.numel())
    return h_RF


def swiglu_backward(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See eager, and swiglu."""
    if not runs(gate_RF):
        return eager.swiglu_backward(grad_RF, gate_RF, up_RF)
    grad_gate_RF = torch.empty_like(gate_RF, memory_format=torch.contiguous_format)
    grad_up_RF = torch.empty_like(grad_gate_RF)
    size = gate_RF.numel()
    tensors = (grad_gate_RF, grad_up_RF, grad_RF, gate_RF, up_RF)
    _launch(swiglu_backward_kernel, (_blocks(size),), *tensors, size)
    return grad_gate_RF, grad_up_RF


def runs(rows: torch.Tensor) -> bool:
    """Whether these rows are for Triton."""
    return rows.dtype in _ROW_DTYPES and os.environ.get("TITAN_MOE_KERNELS", "auto") != "eager"


def _sum(
    y_ND: torch.Tensor,
    also_ND: torch.Tensor | None,
    scores_TK: torch.Tensor | None,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None,
) -> torch.Tensor:
    (num_tokens, top_k), dim = place_TK.shape, y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, dim)
    grid = (num_tokens, _blocks(dim))
    _launch(sum_kernel, grid, out_TD, y_ND, also_ND, scores_TK, place_TK, present_TK, dim, top_k)
    return out_TD


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK)


def _launch(kernel: Any, grid: tuple[int, ...], out: torch.Tensor, *args: torch.Tensor | int | None) -> None:
    """Runs a kernel on the device of its result; a grid of no programs is an error on CUDA."""
    if 0 in grid:
        return
    whole = [_aligned(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with torch.cuda.device_of(out):
        kernel[grid](out, *whole, BLOCK=BLOCK, **LAUNCH)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and from a multiple of 16 bytes on, copied where it is not.

    Triton compiles another kernel for other pointers, whose dot products may sum in another order.
    """
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
