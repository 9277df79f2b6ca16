"""Our MoE layer under torchtitan's own entry point:

    torchrun ... -m torchtitan.train --module deepseek_v3 --config deepseek_v3_16b \\
        --override.imports titan_moe.override.moe --parallelism.spmd_backend partial_dtensor

or ``titan_moe.override.moe={"dispatcher":"deepep","combine":"per_slot"}``. Names of parameters stay, so
checkpoints of either load into the other. Routing replay, captures and metrics.jsonl need our own trainer,
``titan_moe.trainer.train``.

First weights: on a CPU they are drawn by name, as our trainer does it, because torchtitan fills every rank's
shards there with the same numbers. On CUDA that is an option, ``{"init_by_name":true}``, because it changes
the weights that a seed gives.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.config import derive, override
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models.common import moe as upstream
from torchtitan.models.common.decoder_sharding import dense_sequence_parallel_placement
from torchtitan.tools.utils import device_type

import titan_moe.trainer  # noqa: F401  (fills torchtitan's gaps on a CPU)
from titan_moe.layer.dispatch.base import DispatchLimits, DispatchMetadata, Routing
from titan_moe.layer.moe import MoE
from titan_moe.models.swap import swap_layer
from titan_moe.parallel.initialization import draw_models_by_name
from titan_moe.parallel.sharding import shard_moe

BACKEND = "partial_dtensor"


class AdoptedMoE(MoE):
    """A layer that torchtitan's ``parallelize`` shards and torchtitan's optimizer hook balances."""

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        """num_max_tokens_per_rank: of a forward, padding included; for backends with fixed buffers."""

        num_max_tokens_per_rank: int | None = None

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Our placements instead of those in the config, and the dispatcher on its mesh."""
        config = self.config
        assert isinstance(config, AdoptedMoE.Config)
        inputs = config.sharding_config.in_src_shardings["x_BLD"]  # type: ignore[union-attr,index]
        shard_moe(self, ep=parallel_dims.ep_enabled, sp=inputs == dense_sequence_parallel_placement())
        super().parallelize(parallel_dims)
        limits = DispatchLimits(
            num_experts=config.num_experts,
            top_k=config.router.top_k,
            dim=config.routed_experts.inner_experts.dim,
            ep_size=parallel_dims.ep,
            num_max_tokens_per_rank=config.num_max_tokens_per_rank or 0,
            device_type=device_type,
            num_expert_groups=config.router.num_expert_groups,
            num_limited_groups=config.router.num_limited_groups,
        )
        dispatcher = self.routed_experts.token_dispatcher
        config.routed_experts.token_dispatcher.validate(limits)  # type: ignore[attr-defined]
        dispatcher.bind(parallel_dims.get_optional_mesh("ep"), limits)

    def _count(self, routing: Routing, receipt: DispatchMetadata, itemsize: int) -> None:
        """Recomputations too: torchtitan's hook halves the counts of checkpointed blocks."""
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert_E.add_(routing.counted_E)


@override(target=upstream.MoE.Config, description="titan_moe's MoE layer")
def moe(
    config: upstream.MoE.Config,
    *,
    dispatcher: str = "all_to_all",
    num_max_tokens_per_rank: int | None = None,
    init_by_name: bool = device_type == "cpu",
    **options: Any,
) -> AdoptedMoE.Config:
    """One of torchtitan's MoE configs as ours.

    Args:
        dispatcher: a name in ``titan_moe.layer.dispatch.DISPATCHERS``; ``options`` are its own.
        num_max_tokens_per_rank: needed by the DeepEP library, whose buffers are sized once.
        init_by_name: the model starts from the same weights on every mesh (``parallel/initialization.py``).

    Raises:
        ValueError: another SPMD backend; ``init_by_name`` false on a CPU; or what ``models.swap`` refuses.
    """
    if get_spmd_backend() != BACKEND:
        raise ValueError(
            f"titan_moe.override.moe needs parallelism.spmd_backend ({get_spmd_backend()!r}) to be "
            f"{BACKEND!r}: its MoE layer works on DTensors; add --parallelism.spmd_backend {BACKEND}"
        )
    if dispatcher == "deepep" and device_type == "cuda" and num_max_tokens_per_rank is None:
        raise ValueError(
            "titan_moe.override.moe with dispatcher 'deepep' needs num_max_tokens_per_rank, the most tokens "
            "of a forward on one rank, for its buffers: "
            'moe={"dispatcher":"deepep","num_max_tokens_per_rank":8192}'
        )
    if init_by_name:
        draw_models_by_name()
    elif device_type == "cpu":
        raise ValueError(
            "titan_moe.override.moe: init_by_name (false) on a CPU would fill the shards of all ranks with "
            "the same numbers; remove the option"
        )
    swapped = swap_layer("MoE", config, dispatcher=dispatcher, **options)
    return derive(swapped, AdoptedMoE.Config, num_max_tokens_per_rank=num_max_tokens_per_rank)
