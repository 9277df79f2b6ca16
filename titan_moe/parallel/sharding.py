"""Placement tables of the MoE layer: data only. docs/sharding.md prints the same table.

The DTensor meshes are torchtitan's ``partial_dtensor`` ones: parameters live on the TP axis or, for
experts with EP on, on the EP axis; FSDP adds its own axis later.
"""

from types import SimpleNamespace

import spmd_types as spmd
from torch import nn
from torchtitan.distributed.parallel_dims import MeshAxisName as Axis
from torchtitan.distributed.parallel_dims import SpmdLayout
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    set_dense_ffn_sharding,
)
from torchtitan.protocols.sharding import ShardingConfig

from titan_moe.layer.border import SHARDED_HIDDEN, SHARDED_TOKENS, TokenBorder
from titan_moe.layer.experts import GroupedExperts
from titan_moe.layer.moe import MoE

# What the region between router and combine reads, hands back and leaves, by "EP is on".
BORDER: dict[bool, TokenBorder] = {True: SHARDED_TOKENS, False: SHARDED_HIDDEN}

# Expert weights with EP on: experts over EP ranks. torchtitan's FSDP adds efsdp.
EXPERTS_OVER_EP = SpmdLayout({Axis.DP_REPLICATE: spmd.R, Axis.EFSDP: spmd.R, Axis.EP: spmd.S(0)})

# Expert weights with EP off: every expert's hidden dim F over TP.
HIDDEN_OVER_TP: dict[str, SpmdLayout] = {
    "w1_EFD": dense_param_placement(tp=spmd.S(1)),
    "w2_EDF": dense_param_placement(tp=spmd.S(2)),
    "w3_EFD": dense_param_placement(tp=spmd.S(1)),
}

# The gate is replicated over TP; its gradient is a sum over TP (router.py, _local_gate).
GATE = ShardingConfig(
    state_shardings={"weight": dense_param_placement(tp=spmd.R), "bias": dense_param_placement(tp=spmd.R)}
)


def expert_sharding(*, ep: bool) -> ShardingConfig:
    """Placements of GroupedExperts' weights."""
    return ShardingConfig(
        state_shardings=dict.fromkeys(HIDDEN_OVER_TP, EXPERTS_OVER_EP) if ep else HIDDEN_OVER_TP
    )


def shard_moe(moe: MoE, *, ep: bool, sp: bool) -> None:
    """Writes the tables onto a built layer, in place of what torchtitan's model config put there.

    The layer and its RoutedExperts get none: the border does by hand, with exact shapes, what
    torchtitan's ``local_map`` would infer.
    """
    moe.border = BORDER[ep]
    moe._sharding_config = None
    moe.routed_experts._sharding_config = None
    moe.router.gate._sharding_config = GATE
    if isinstance(moe.routed_experts.inner_experts, GroupedExperts):
        moe.routed_experts.inner_experts._sharding_config = expert_sharding(ep=ep)
    if moe.shared_experts is not None:
        _shard_shared_experts(moe.shared_experts, sp=sp)


def _shard_shared_experts(shared: nn.Module, *, sp: bool) -> None:
    """The dense feed-forward's placements, which torchtitan writes into a config: shared experts are one."""
    config = SimpleNamespace(w1=SimpleNamespace(), w2=SimpleNamespace(), w3=SimpleNamespace())
    x_layout = dense_sequence_parallel_placement() if sp else dense_activation_placement(tp=spmd.I)
    set_dense_ffn_sharding(config, attn_x_layout=x_layout, enable_sp=sp)
    shared._sharding_config = config.sharding_config
    for name in ("w1", "w2", "w3"):
        getattr(shared, name)._sharding_config = getattr(config, name).sharding_config
