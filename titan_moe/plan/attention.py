"""A stand-in for the fused attention of a GPU: its shapes and what it keeps, no arithmetic."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, SelectiveAC
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module

from titan_moe.models.attention import PackedSDPA


@torch.library.custom_op("titan_moe_plan::attention", mutates_args=())
def _attention(
    q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("the plan's attention computes nothing; it is for tensors without data")


@_attention.register_fake
def _(q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, seq_len, heads, _ = q_BLNH.shape
    out_BLNH = q_BLNH.new_empty(batch_size, seq_len, heads, v_BLNH.shape[-1])
    return out_BLNH, q_BLNH.new_empty(batch_size, seq_len, heads, dtype=torch.float32)


@torch.library.custom_op("titan_moe_plan::attention_backward", mutates_args=())
def _attention_backward(
    grad_BLNH: torch.Tensor, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise RuntimeError("the plan's attention computes nothing; it is for tensors without data")


@_attention_backward.register_fake
def _(
    grad_BLNH: torch.Tensor, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.empty_like(x_BLNH) for x_BLNH in (q_BLNH, k_BLNH, v_BLNH))  # type: ignore[return-value]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    # Flex, Flash and cuDNN keep the same five: q, k, v, the output and a log-sum-exp per query.
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad_BLNH: torch.Tensor, _: Any) -> Any:
    return _attention_backward(grad_BLNH, *ctx.saved_tensors[:3])


_attention.register_autograd(_backward, setup_context=_save)


class PlannedAttention(FlexAttention):
    """What FlexAttention allocates and keeps. Causality and documents change neither."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """No keys of its own."""

    def __init__(self, config: Config) -> None:
        Module.__init__(self)

    def forward(
        self, q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor, **_: object
    ) -> torch.Tensor:
        """``(B, L, heads, head dim of v)``."""
        return _attention(q_BLNH, k_BLNH, v_BLNH)[0]


class PlannedSelectiveAC(SelectiveAC):
    """torchtitan's selective checkpointing; it keeps this attention's outputs as it keeps Flex's."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """torchtitan's fields."""

    def get_save_ops(self) -> set:
        """torchtitan's, and this attention."""
        return super().get_save_ops() | {torch.ops.titan_moe_plan.attention.default}


def plan_attention(model: BaseModel.Config) -> None:
    """Puts the stand-in into a model's config, in place."""
    for kind in (FlexAttention.Config, VarlenAttention.Config, PackedSDPA.Config):
        found: list[Any] = list(model.traverse(kind))
        for _, config, parent, attr in found:
            if not isinstance(config, PlannedAttention.Config):
                setattr(parent, attr, PlannedAttention.Config())


def planned(ac_config: ActivationCheckpointing.Config | None) -> ActivationCheckpointing.Config | None:
    """``ac_config``, for a model with the stand-in in it."""
    if type(ac_config) is not SelectiveAC.Config:
        return ac_config
    fields = {f.name: getattr(ac_config, f.name) for f in dataclasses.fields(ac_config)}
    return PlannedSelectiveAC.Config(**fields)
