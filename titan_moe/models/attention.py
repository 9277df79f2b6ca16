"""Attention over packed documents where FlexAttention has no backward: CPU."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from torchtitan.models.common import attention as upstream
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module
from torchtitan.tools.utils import device_type


class PackedSDPA(FlexAttention):
    """FlexAttention's mask, by SDPA with booleans.

    A FlexAttention for torchtitan: its trainer and validator then make the BlockMask of the documents in
    ``positions``, and context parallelism cuts it and gathers keys and values, as on a GPU.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """FlexAttention's fields; the kernel's mean nothing here."""

    def __init__(self, config: Config) -> None:
        Module.__init__(self)

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: BlockMask,
        scale: float | None = None,
        enable_gqa: bool = False,
        **_: object,
    ) -> torch.Tensor:
        """``(B, L, heads, head dim)``; under CP keys and values are longer than queries."""
        q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        mask_B1LL = create_mask(
            attention_masks.mask_mod, len(q_BNLH), None, q_BNLH.shape[2], k_BNLH.shape[2], q_BNLH.device
        )
        out_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=mask_B1LL, scale=scale, enable_gqa=enable_gqa
        )
        return out_BNLH.transpose(1, 2)


def swap_attention(model: BaseModel.Config) -> None:
    """On CPU, replaces Flex and Varlen attention, in place."""
    if device_type != "cpu":
        return
    # Compiling the making of a mask takes longer than a run here.
    for module in (upstream, context_parallel):
        setattr(module, "_compiled_create_block_mask", create_block_mask)  # noqa: B010
    for kind in (FlexAttention.Config, VarlenAttention.Config):
        found: list[Any] = list(model.traverse(kind))
        for _, _, parent, attr in found:
            setattr(parent, attr, PackedSDPA.Config())
