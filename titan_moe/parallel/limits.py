"""The sizes that a dispatcher may count on for a whole run."""

from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.models.common import moe as upstream
from torchtitan.tools.utils import device_type

from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.parallel.sharding import BORDER


def dispatch_limits(
    layer: upstream.MoE.Config,
    *,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig,
) -> DispatchLimits:
    """The sizes a dispatcher may count on for a whole run, the same on every rank."""
    pipelined = parallelism.pipeline_parallel_degree > 1
    sequences = parallelism.pipeline_parallel_microbatch_size if pipelined else training.local_batch_size
    ep = parallelism.expert_parallel_degree
    shards = parallelism.tensor_parallel_degree if BORDER[ep > 1].tokens.is_shard() else 1
    seq_len = training.seq_len // parallelism.context_parallel_degree
    return DispatchLimits(
        num_experts=layer.num_experts,
        top_k=layer.router.top_k,
        dim=layer.routed_experts.inner_experts.dim,
        ep_size=ep,
        num_max_tokens_per_rank=sequences * -(-seq_len // shards),
        dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        device_type=device_type,
        compiled=compile_config.enable and "model" in compile_config.components,
        num_expert_groups=layer.router.num_expert_groups,
        num_limited_groups=layer.router.num_limited_groups,
    )
