"""A model onto its meshes: an ordered list of calls. A torchtitan ModelSpec's ``parallelize_fn``."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing
from torchtitan.distributed.compile import apply_compile
from torchtitan.distributed.context_parallel import apply_cp_to_forward
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.deepseek_v3.mtp import MTPDecoder, apply_fsdp_to_mtp_decoder
from torchtitan.tools.utils import device_type

from titan_moe.layer.moe import MoE
from titan_moe.parallel.limits import dispatch_limits
from titan_moe.parallel.sharding import shard_moe
from titan_moe.replay.regions import Regions
from titan_moe.replay.selectors import bind_selectors


def parallelize(
    model: Decoder,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
    ac_config: ActivationCheckpointing.Config | None,
    dump_folder: str,
    recompute_pin: bool = True,
) -> Decoder:
    """Shards, binds and wraps ``model`` in place. Each call below needs the ones above it.

    Args:
        model: on the meta device, with MoE layers of ours (``models.swap_moe``).
        parallel_dims: its meshes decide which calls do anything.
        ac_config: None switches activation checkpointing off.
        recompute_pin: recomputation routes as its forward did, even where its scores come out different.
    """
    blocks: list[Any] = list(model.layers.values())
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for moe in layers:
        shard_moe(moe, ep=parallel_dims.ep_enabled, sp=parallelism.enable_sequence_parallel)
    if parallel_dims.cp_enabled and blocks:  # a PP stage may hold the head alone
        # torchtitan: CP wraps the attention's forward before local_map does.
        apply_cp_to_forward(
            [block.attention.inner_attention for block in blocks], parallel_dims.get_mesh("cp")
        )
    if parallel_dims.tp_enabled or parallel_dims.ep_enabled:
        model.parallelize(parallel_dims)
    for moe in layers:
        limits = dispatch_limits(
            moe.config, training=training, parallelism=parallelism, compile_config=compile_config
        )
        moe.routed_experts.token_dispatcher.bind(parallel_dims.get_optional_mesh("ep"), limits)
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config.enable and "model" in compile_config.components:
        apply_compile(model, compile_config=compile_config, parallel_dims=parallel_dims)
    else:
        regions = Regions()
        bind_selectors(model, regions)
        if recompute_pin:
            regions.pin(model)
    _apply_fsdp(model, parallel_dims, training, parallelism)
    _reduce_norms_at_once(parallel_dims)
    return model


def unbind(model_parts: list[nn.Module]) -> None:
    """Gives back what ``parallelize`` bound. Collective; before the process groups end."""
    for part in model_parts:
        for module in part.modules():
            if isinstance(module, MoE):
                module.routed_experts.token_dispatcher.unbind()


def _apply_fsdp(
    model: Decoder, parallel_dims: ParallelDims, training: TrainingConfig, parallelism: ParallelismConfig
) -> None:
    """FSDP2 or HSDP by torchtitan's rules: experts over efsdp when EP is on, all else over fsdp."""
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    apply: Any = apply_fsdp_to_mtp_decoder if isinstance(model, MTPDecoder) else apply_fsdp_to_decoder
    apply(
        model,
        parallel_dims.get_mesh([*replicate, "fsdp"]),
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        pp_enabled=parallel_dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        ep_degree=parallel_dims.ep,
        edp_mesh=parallel_dims.get_mesh([*replicate, "efsdp"]) if parallel_dims.ep_enabled else None,
        enable_symm_mem=parallelism.enable_fsdp_symm_mem,
    )
    sum_over_gloo(model)


def _reduce_norms_at_once(parallel_dims: ParallelDims) -> None:
    """A parameter's norm is summed over its two sharded axes in one collective, not in two.

    DTensor looks for a flattened mesh of these axes, and warns where there is none.
    """
    for axes in (["fsdp", "tp"], ["efsdp", "ep"]):
        mesh = parallel_dims.get_optional_mesh(axes)
        if mesh is not None and mesh.ndim == 2:
            mesh._flatten()


def sum_over_gloo(model: nn.Module) -> None:
    """On CPU: gloo has no PREMUL_SUM, which FSDP2 picks for its gradient scaling."""
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
