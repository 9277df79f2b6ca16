"""Upstream's bugs, planted from outside: the tests that pass on ours must fail on these."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from titan_moe.layer import router
from titan_moe.layer.border import SHARDED_HIDDEN, SHARDED_TOKENS, TokenBorder
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.moe import MoE


@dataclass(frozen=True, kw_only=True)
class _FlatOffset(TokenBorder):
    """pytorch/torchtitan#3604: each rank adds its tokens to a whole buffer at ``sp_rank * T``."""

    def leave(self, out_TD: Tensor, layout: TokenLayout, like: Tensor) -> Tensor:
        assert isinstance(like, DTensor)
        whole_TD = out_TD.new_zeros(layout.local_batch_size * layout.global_seq_len, layout.dim)
        places_T = torch.arange(out_TD.shape[0]) + layout.sp_rank * layout.num_local_tokens
        out_BLD = whole_TD.index_copy(0, places_T, out_TD).view(layout.global_shape)
        placed = DTensor.from_local(out_BLD, like.device_mesh, [Partial()], run_check=False)
        return placed.redistribute(placements=like.placements)


@dataclass(frozen=True, kw_only=True)
class _InferredShape(TokenBorder):
    """pytorch/torchtitan#3577: the global length is taken to be ``local * sp_size``."""

    def leave(self, out_TD: Tensor, layout: TokenLayout, like: Tensor) -> Tensor:
        assert isinstance(like, DTensor)
        local = out_TD.view(layout.local_shape)
        placed = DTensor.from_local(local, like.device_mesh, [self.outputs], run_check=False)
        return placed.redistribute(placements=like.placements)


def _flat_offset(layer: MoE) -> None:
    layer.border = _FlatOffset(**vars(SHARDED_TOKENS))


def _inferred_shape(layer: MoE) -> None:
    layer.border = _InferredShape(**vars(SHARDED_TOKENS))


def _skipped_experts(layer: MoE) -> None:
    """NVIDIA/Megatron-LM#4851: no rows, no work, no gradient."""
    experts = layer.routed_experts.inner_experts
    forward = experts.forward
    experts.forward = lambda x_RD, *args: forward(x_RD, *args) if x_RD.shape[0] else x_RD  # type: ignore


def _unreduced_tokens(layer: MoE) -> None:
    """pytorch/torchtitan#4054: below the experts with EP off, each TP rank keeps its part of dX."""
    layer.border = TokenBorder(tokens=Replicate(), token_grads=Replicate(), outputs=SHARDED_HIDDEN.outputs)


def _unreduced_gate(layer: MoE) -> None:
    """pytorch/torchtitan#2387: the gate's gradient is taken to be whole on each TP rank."""
    weight = layer.router.gate.weight
    layer.router._scores = lambda x_TD: router.F.linear(  # type: ignore[method-assign]
        x_TD, weight.to_local() if isinstance(weight, DTensor) else weight
    ).sigmoid()


FAULTS: dict[str, Callable[[MoE], None]] = {
    "flat_offset": _flat_offset,
    "inferred_shape": _inferred_shape,
    "skipped_experts": _skipped_experts,
    "unreduced_tokens": _unreduced_tokens,
    "unreduced_gate": _unreduced_gate,
}
