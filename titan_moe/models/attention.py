"""Attention over packed documents where FlexAttention has no backward: CPU."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import FlexAttention, VarlenAttention, VarlenMetadata
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.module import Module
from torchtitan.tools.utils import device_type


class PackedSDPA(VarlenAttention):
    """Causal inside each document, by SDPA with a boolean mask.

    A VarlenAttention for torchtitan: its trainer and validator then hand over the document borders
    they derive from ``positions``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        """No keys of its own."""

    def __init__(self, config: Config) -> None:
        Module.__init__(self)  # VarlenAttention's own picks a flash kernel

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        enable_gqa: bool = False,
        **_: object,
    ) -> torch.Tensor:
        """``(B, L, heads, head dim)``; the metadata's document borders count flattened B * L tokens."""
        q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        mask_B1LL = _same_document_and_causal(attention_masks.cu_seq_q, *q_BLNH.shape[:2])
        out_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=mask_B1LL, scale=scale, enable_gqa=enable_gqa
        )
        return out_BNLH.transpose(1, 2)


def swap_attention(model: BaseModel.Config) -> None:
    """On CPU, replaces Flex and Varlen attention, in place."""
    if device_type != "cpu":
        return
    for kind in (FlexAttention.Config, VarlenAttention.Config):
        found: list[Any] = list(model.traverse(kind))
        for _, _, parent, attr in found:
            setattr(parent, attr, PackedSDPA.Config())


def _same_document_and_causal(starts: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
    tokens = torch.arange(batch_size * seq_len, device=starts.device)
    document_BL = torch.bucketize(tokens, starts.to(tokens.dtype), right=True).view(batch_size, seq_len)
    same_BLL = document_BL.unsqueeze(2) == document_BL.unsqueeze(1)
    causal_LL = torch.ones(seq_len, seq_len, dtype=torch.bool, device=starts.device).tril()
    return (same_BLL & causal_LL).unsqueeze(1)
