"""The kernels as torch custom ops ``titan_moe::*``, so that compile, fake tensors and modes see one op each.

``native`` serves CPU tensors, ``gpu`` CUDA ones, ``eager`` all others. No autograd here: the formulas of
backward are in ``dispatch/ops.py`` and ``experts.py``.
"""

import functools
from typing import Any

import torch

from titan_moe.layer.kernels import eager, native

_SCHEMAS = (
    "sum_rows(Tensor y_ND, Tensor place_TK, Tensor? present_TK=None, Tensor? also_ND=None) -> Tensor",
    "weighted_sum(Tensor y_ND, Tensor scores_TK, Tensor place_TK, Tensor? present_TK=None) -> Tensor",
    "weighted_sum_backward(Tensor grad_TD, Tensor y_ND, Tensor scores_TK, Tensor order_N)"
    " -> (Tensor, Tensor)",
    "swiglu(Tensor gate_RF, Tensor up_RF) -> Tensor",
    "swiglu_backward(Tensor grad_RF, Tensor gate_RF, Tensor up_RF) -> (Tensor, Tensor)",
    "gate(Tensor x_TD, Tensor w_ED) -> Tensor",
    "gate_backward(Tensor grad_TE, Tensor x_TD, Tensor w_ED) -> (Tensor, Tensor)",
)

_MATMULS = ("gate", "gate_backward")  # torch's own on a GPU

_LIBRARY = torch.library.Library("titan_moe", "DEF")


def _register() -> None:
    for schema in _SCHEMAS:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, getattr(eager, name), "CompositeExplicitAutograd")
        _LIBRARY.impl(name, getattr(native, name), "CPU")
        if name not in _MATMULS:
            _LIBRARY.impl(name, _on_gpu(name), "CUDA")
        torch.library.register_fake(f"titan_moe::{name}", globals()[f"_fake_{name}"], lib=_LIBRARY)


def _on_gpu(name: str) -> Any:
    return lambda *args: getattr(gpu_kernels(), name)(*args)


@functools.cache
def gpu_kernels() -> Any:
    """Triton's, loaded where there is a GPU only; eager's where Triton is not installed."""
    try:
        from titan_moe.layer.kernels import gpu
    except ImportError:
        return eager
    return gpu


def _fake_sum_rows(
    y_ND: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
    also_ND: torch.Tensor | None = None,
) -> torch.Tensor:
    return y_ND.new_empty(place_TK.shape[0], y_ND.shape[1])


def _fake_weighted_sum(
    y_ND: torch.Tensor,
    scores_TK: torch.Tensor,
    place_TK: torch.Tensor,
    present_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    return y_ND.new_empty(place_TK.shape[0], y_ND.shape[1])


def _fake_weighted_sum_backward(
    grad_TD: torch.Tensor, y_ND: torch.Tensor, scores_TK: torch.Tensor, order_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = eager.accumulation_dtype(y_ND.dtype)
    return y_ND.new_empty(y_ND.shape), y_ND.new_empty(y_ND.shape[0], dtype=acc)


def _fake_swiglu(gate_RF: torch.Tensor, up_RF: torch.Tensor) -> torch.Tensor:
    return gate_RF.new_empty(gate_RF.shape)


def _fake_swiglu_backward(
    grad_RF: torch.Tensor, gate_RF: torch.Tensor, up_RF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_RF.new_empty(gate_RF.shape), gate_RF.new_empty(gate_RF.shape)


def _fake_gate(x_TD: torch.Tensor, w_ED: torch.Tensor) -> torch.Tensor:
    acc = eager.accumulation_dtype(x_TD.dtype)
    return x_TD.new_empty(x_TD.shape[0], w_ED.shape[0], dtype=acc)


def _fake_gate_backward(
    grad_TE: torch.Tensor, x_TD: torch.Tensor, w_ED: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = eager.accumulation_dtype(x_TD.dtype)
    return x_TD.new_empty(x_TD.shape), w_ED.new_empty(w_ED.shape, dtype=acc)


_register()

sum_rows = torch.ops.titan_moe.sum_rows
weighted_sum = torch.ops.titan_moe.weighted_sum
weighted_sum_backward = torch.ops.titan_moe.weighted_sum_backward
swiglu = torch.ops.titan_moe.swiglu
swiglu_backward = torch.ops.titan_moe.swiglu_backward
gate = torch.ops.titan_moe.gate
gate_backward = torch.ops.titan_moe.gate_backward
