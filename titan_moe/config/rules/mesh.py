"""Rules about ranks: degrees, batches, sequences, pipeline stages, and what FSDP can split."""

import inspect
import math
import os
from typing import Any

import torch
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torchtitan.models.common.attention import FlexAttention, VarlenAttention

from titan_moe.config.rules.facts import Broken, Facts, divisors

_DEGREES = {
    "data_parallel_replicate_degree": 1,
    "data_parallel_shard_degree": -1,
    "context_parallel_degree": 1,
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "expert_parallel_degree": 1,
}


def degrees_are_positive(facts: Facts) -> None:
    """Each degree is at least 1; -1 means "what is left" for dp_shard only."""
    for name, lowest in _DEGREES.items():
        degree = getattr(facts.parallelism, name)
        if degree < lowest or degree == 0:
            remedy = "use -1 for all ranks that are left, or at least 1" if lowest == -1 else "use at least 1"
            raise Broken(f"parallelism.{name} ({degree}) is not a number of ranks; {remedy}")


def degrees_fill_the_world(facts: Facts) -> None:
    """dp_replicate * dp_shard * cp * tp * pp is the number of ranks."""
    fixed = facts.dp_replicate * facts.cp * facts.tp * facts.pp
    set_degrees = [
        facts.show(f"parallelism.{name}")
        for name in _DEGREES
        if name != "expert_parallel_degree" and getattr(facts.parallelism, name) != 1
    ]
    named = ", ".join(set_degrees) or "parallelism: all degrees 1"
    ranks = facts.world_size
    if facts.parallelism.data_parallel_shard_degree < 0:
        if ranks % fixed:
            raise Broken(
                f"{named}: the other degrees multiply to {fixed}, which must divide the {ranks} ranks; "
                f"run a multiple of {fixed} ranks (NGPU={fixed}) or change a degree"
            )
    elif fixed * facts.dp_shard != ranks:
        needed = fixed * facts.dp_shard
        raise Broken(
            f"{named}: the degrees multiply to {needed} but there are {ranks} ranks, "
            f"too {'many' if ranks > needed else 'few'}; run {needed} ranks (NGPU={needed}) or set "
            "parallelism.data_parallel_shard_degree = -1"
        )


def expert_parallel_fits_the_mesh(facts: Facts) -> None:
    """EP borrows ranks from dp_shard, cp and tp, so it divides their product."""
    lenders = facts.dp_shard * facts.cp * facts.tp
    if lenders % facts.ep:
        raise Broken(
            f"{facts.show('parallelism.expert_parallel_degree')} must divide data_parallel_shard_degree * "
            f"context_parallel_degree * tensor_parallel_degree = {facts.dp_shard} * {facts.cp} * {facts.tp} "
            f"= {lenders}; use {divisors(lenders)}"
        )


def spmd_backend_is_ours(facts: Facts) -> None:
    """Our MoE crosses the DTensor border itself, on partial_dtensor's meshes."""
    if facts.parallelism.spmd_backend != "partial_dtensor":
        raise Broken(
            f"{facts.show('parallelism.spmd_backend')}: the MoE layer owns the border between DTensor and "
            "local tokens and needs 'partial_dtensor'; remove the key"
        )


def batch_divides(facts: Facts) -> None:
    """The global batch is whole local batches on every data-parallel rank."""
    dp = facts.dp_replicate * facts.dp_shard
    per_step = facts.training.local_batch_size * dp
    batch = facts.training.global_batch_size
    if batch != -1 and (batch < 1 or batch % per_step):
        raise Broken(
            f"{facts.show('training.global_batch_size')} must be a multiple of "
            f"{facts.show('training.local_batch_size')} * data-parallel degree ({dp}) = {per_step}; "
            f"use {max(1, round(batch / per_step)) * per_step}, or -1 for no gradient accumulation"
        )


def heads_divide_over_tp(facts: Facts) -> None:
    """Attention heads are split over TP."""
    attention: Any = facts.model.first_attention
    for name in ("n_heads", "n_kv_heads"):
        heads = getattr(attention, name, None)
        if heads and heads % facts.tp:
            raise Broken(
                f"{facts.show('parallelism.tensor_parallel_degree')} must divide {name} ({heads}) of "
                f"{facts.flavor}; use {divisors(heads)}"
            )


def sequence_fits_rope(facts: Facts) -> None:
    """Positions beyond RoPE's table do not exist."""
    if facts.training.seq_len > facts.model.max_seq_len:
        raise Broken(
            f"{facts.show('training.seq_len')} exceeds the RoPE max_seq_len ({facts.model.max_seq_len}) of "
            f"{facts.flavor}; use at most {facts.model.max_seq_len}"
        )


def sequence_divides_over_cp(facts: Facts) -> None:
    """The load-balanced split gives each CP rank a head and a tail chunk. TP has no such rule here."""
    chunks = 2 * facts.cp
    if facts.cp > 1 and facts.training.seq_len % chunks:
        below = facts.training.seq_len // chunks * chunks
        raise Broken(
            f"{facts.show('training.seq_len')} must be a multiple of 2 * "
            f"{facts.show('parallelism.context_parallel_degree')} = {chunks}; "
            f"use {f'{below} or ' if below else ''}{below + chunks}"
        )


def context_parallel_has_attention(facts: Facts) -> None:
    """torchtitan's CP wraps Flex and plain SDPA; varlen, which is what runs on CPU, is refused by it."""
    balancer = facts.parallelism.context_parallel_load_balancer
    if balancer not in ("headtail", "ptrr", None):
        raise Broken(
            f"{facts.show('parallelism.context_parallel_load_balancer')} must be 'headtail', 'ptrr' or 'none'"
        )
    if facts.cp == 1:
        return
    attention = getattr(facts.model.first_attention, "inner_attention", None)
    if isinstance(attention, VarlenAttention.Config):
        raise Broken(
            f"{facts.show('parallelism.context_parallel_degree')} needs FlexAttention or plain SDPA, and on "
            f"{facts.device} {facts.flavor} runs another attention; use 1, or a GPU"
        )
    if balancer == "ptrr" and not isinstance(attention, FlexAttention.Config):
        raise Broken(
            f"{facts.show('parallelism.context_parallel_load_balancer')} needs FlexAttention, which "
            f"{facts.flavor} does not use; set 'headtail'"
        )


def pipeline_has_stages(facts: Facts) -> None:
    """The schedule exists, and the layers fill its stages."""
    if facts.pp == 1:
        return
    if facts.plan.spec.pipelining_fn is None or facts.model.enable_weight_tying:
        why = "ties its embedding to its head" if facts.model.enable_weight_tying else "has no pipeline split"
        raise Broken(f"{facts.show('parallelism.pipeline_parallel_degree')}: {facts.flavor} {why}; use 1")
    csv = facts.parallelism.pipeline_parallel_schedule_csv
    if csv and not os.path.isfile(csv):
        raise Broken(f"{facts.show('parallelism.pipeline_parallel_schedule_csv')}: no such file")
    try:
        schedule = get_schedule_class(facts.parallelism.pipeline_parallel_schedule)
    except ValueError as error:
        raise Broken(f"{facts.show('parallelism.pipeline_parallel_schedule')}: {error}") from None
    if facts.parallelism.module_fqns_per_model_part is None:
        _stages_fit(facts, single=issubclass(schedule, PipelineScheduleSingle))


def _stages_fit(facts: Facts, *, single: bool) -> None:
    """torchtitan counts the embedding and the head as that many layers of the first and last stage."""
    first = facts.parallelism.pipeline_parallel_first_stage_less_layers
    last = facts.parallelism.pipeline_parallel_last_stage_less_layers
    layers = len(facts.model.layers) + first + last
    stages = facts.pp if single else 2 * facts.pp
    per_stage = facts.parallelism.pipeline_parallel_layers_per_stage
    if per_stage is not None:
        wanted, stages = stages, math.ceil(layers / per_stage)
        if stages % facts.pp or (stages != wanted if single else stages < wanted):
            raise Broken(
                f"{facts.show('parallelism.pipeline_parallel_layers_per_stage')} makes {stages} stages of "
                f"{layers} layers, but {facts.show('parallelism.pipeline_parallel_schedule')} on "
                f"{facts.show('parallelism.pipeline_parallel_degree')} wants "
                f"{'exactly 1' if single else '2 or more'} per rank; use {math.ceil(layers / wanted)}"
            )
    if layers // stages < max(1, first, last):
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_degree')} makes {stages} stages for the {layers} "
            f"layers of {facts.flavor} (embedding and head included); use a lower degree"
        )


def pipeline_takes_microbatches(facts: Facts) -> None:
    """torchtitan 0.3.0 hands its schedule lists of microbatches; torch 2.13's takes one whole batch."""
    if facts.pp > 1 and not schedule_takes_microbatches():
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_degree')}: torchtitan 0.3.0 calls step(arg_mbs=...) "
            f"of a pipeline schedule, which torch {torch.__version__} does not have; use 1, or a newer torch"
        )


def schedule_takes_microbatches() -> bool:
    """Whether this torch's pipeline schedules are the ones that torchtitan 0.3.0 was written for."""
    return "arg_mbs" in inspect.signature(PipelineScheduleSingle.step).parameters


def fsdp_splits_experts_evenly(facts: Facts) -> None:
    """With more FSDP ranks than experts torchtitan splits experts on their second dim, FSDP2 only evenly."""
    if facts.ep > 1:
        shards = facts.dp_shard * facts.cp * facts.tp // facts.ep
        counted, split = shards * facts.ep, 1
    else:
        shards = facts.dp_shard * facts.cp
        counted, split = shards * facts.dp_replicate, facts.tp  # torchtitan counts the replicas too
    for name, layer in facts.moe_layers:
        experts = layer.routed_experts.inner_experts
        hidden = experts.hidden_dim // split
        if counted > experts.num_experts and (hidden % shards or experts.dim % shards):
            raise Broken(
                f"{name} of {facts.flavor}: {shards} FSDP ranks (parallelism.data_parallel_shard_degree and "
                f"what EP leaves) outnumber its {experts.num_experts} experts and must then divide its dim "
                f"({experts.dim}) and its hidden dim per rank ({hidden}); change a degree"
            )


RULES = (
    degrees_are_positive,
    degrees_fill_the_world,
    expert_parallel_fits_the_mesh,
    spmd_backend_is_ours,
    batch_divides,
    heads_divide_over_tp,
    sequence_fits_rope,
    sequence_divides_over_cp,
    context_parallel_has_attention,
    pipeline_has_stages,
    pipeline_takes_microbatches,
    fsdp_splits_experts_evenly,
)
