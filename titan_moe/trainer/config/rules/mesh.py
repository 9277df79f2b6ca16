"""Rules about ranks: degrees, batches, sequences, pipeline stages, and what FSDP can split."""

import math
import os
from typing import Any

import torch
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    get_schedule_class,
)
from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.attention import FlexAttention

from titan_moe.trainer import device
from titan_moe.trainer.config.rules.facts import Broken, Facts, divisors

_DEGREES = {
    "data_parallel_replicate_degree": 1,
    "data_parallel_shard_degree": -1,
    "context_parallel_degree": 1,
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "expert_parallel_degree": 1,
}

_FOLDED = (ScheduleZBVZeroBubble, ScheduleDualPipeV)  # down the ranks and up again: two stages each
_SPLIT = (*_FOLDED, ScheduleInterleavedZeroBubble)  # backward for inputs, and later for weights


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


def sequence_reaches_tp_ranks(facts: Facts) -> None:
    """Where DTensor cannot leave a norm's input sharded, torchtitan's RMSNorm raises in the first step."""
    if not facts.parallelism.enable_sequence_parallel or device.norms_keep_short_shards():
        return
    if facts.training.seq_len < facts.tp:
        raise Broken(
            f"{facts.show('training.seq_len')} is shorter than "
            f"{facts.show('parallelism.tensor_parallel_degree')}, and this torch ({torch.__version__}) "
            f"replicates such a sequence in a norm; use at least {facts.tp}, or torch 2.13"
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


def context_parallel_has_attention(facts: Facts) -> None:
    """torchtitan's CP cuts FlexAttention's mask; it refuses varlen."""
    balancer = facts.parallelism.context_parallel_load_balancer
    if balancer not in ("headtail", "ptrr", None):
        raise Broken(
            f"{facts.show('parallelism.context_parallel_load_balancer')} must be 'headtail', 'ptrr' or 'none'"
        )
    attention = getattr(facts.model.first_attention, "inner_attention", None)
    if facts.cp > 1 and not isinstance(attention, FlexAttention.Config):
        raise Broken(
            f"{facts.show('parallelism.context_parallel_degree')} needs FlexAttention, which {facts.flavor} "
            "does not use; use 1"
        )


def sequence_divides_over_cp(facts: Facts) -> None:
    """A CP rank takes whole blocks of the mask. TP has no such rule here."""
    whole = _DEFAULT_SPARSE_BLOCK_SIZE * facts.cp
    if facts.cp > 1 and facts.training.seq_len % whole:
        below = facts.training.seq_len // whole * whole
        raise Broken(
            f"{facts.show('training.seq_len')} must be a multiple of "
            f"{facts.show('parallelism.context_parallel_degree')} * {_DEFAULT_SPARSE_BLOCK_SIZE} (a block of "
            f"FlexAttention's mask) = {whole}; use {f'{below} or ' if below else ''}{below + whole}"
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
        schedule = _schedule(facts)
    except ValueError as error:
        raise Broken(f"{facts.show('parallelism.pipeline_parallel_schedule')}: {error}") from None
    if schedule in (PipelineScheduleSingle, PipelineScheduleMulti) and not csv:
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_schedule')} needs "
            "parallelism.pipeline_parallel_schedule_csv, which says what runs when; name one, or use '1F1B'"
        )
    if not hasattr(PipelineStage, "_compute_outputs"):
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_degree')}: torch {torch.__version__} learns a "
            "stage's shapes in a way that titan_moe does not know, and would count made-up tokens; "
            "use 1, or torch 2.13"
        )
    if facts.parallelism.module_fqns_per_model_part is None:
        _stages_fit(facts, schedule)


def _schedule(facts: Facts) -> type:
    return get_schedule_class(facts.parallelism.pipeline_parallel_schedule)


def _layers(facts: Facts) -> int:
    """torchtitan counts the embedding and the head as that many layers of the first and last stage."""
    first = facts.parallelism.pipeline_parallel_first_stage_less_layers
    return len(facts.model.layers) + first + facts.parallelism.pipeline_parallel_last_stage_less_layers


def _stages(facts: Facts) -> int:
    """Of all ranks."""
    if facts.parallelism.module_fqns_per_model_part is not None:
        return len(facts.parallelism.module_fqns_per_model_part)
    per_stage = facts.parallelism.pipeline_parallel_layers_per_stage
    if per_stage is not None:
        return math.ceil(_layers(facts) / per_stage)
    return facts.pp if issubclass(_schedule(facts), PipelineScheduleSingle) else 2 * facts.pp


def _stages_fit(facts: Facts, schedule: type) -> None:
    single = issubclass(schedule, PipelineScheduleSingle)
    layers, stages, wanted = _layers(facts), _stages(facts), facts.pp if single else 2 * facts.pp
    exactly = single or schedule in _FOLDED

    def fits(stages: int) -> bool:
        return stages % facts.pp == 0 and (stages == wanted if exactly else stages >= wanted)

    if not fits(stages):
        better = math.ceil(layers / wanted)
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_layers_per_stage')} makes {stages} stages of "
            f"{layers} layers, but {facts.show('parallelism.pipeline_parallel_schedule')} on "
            f"{facts.show('parallelism.pipeline_parallel_degree')} wants "
            f"{'exactly' if exactly else 'at least'} {wanted // facts.pp} per rank; "
            f"{f'use {better}' if fits(math.ceil(layers / better)) else 'remove the key'}"
        )
    first = facts.parallelism.pipeline_parallel_first_stage_less_layers
    last = facts.parallelism.pipeline_parallel_last_stage_less_layers
    if layers // stages < max(1, first, last):
        raise Broken(
            f"{facts.show('parallelism.pipeline_parallel_degree')} makes {stages} stages for the {layers} "
            f"layers of {facts.flavor} (embedding and head included); use a lower degree"
        )


def microbatches_suit_the_schedule(facts: Facts) -> None:
    """Some schedules want at least one microbatch per stage, some whole rounds over the ranks."""
    if facts.pp == 1:
        return
    schedule, stages = _schedule(facts), _stages(facts)
    number = facts.training.local_batch_size // facts.microbatch
    named = (
        f"{facts.show('training.local_batch_size')} / "
        f"{facts.show('parallelism.pipeline_parallel_microbatch_size')} = {number} microbatches"
    )
    if schedule in (Schedule1F1B, ScheduleDualPipeV) and number < stages:
        raise Broken(
            f"{named} are fewer than the {stages} stages of "
            f"{facts.show('parallelism.pipeline_parallel_schedule')}; "
            f"use training.local_batch_size = {stages * facts.microbatch}"
        )
    rounds = max(1, number // facts.pp)
    if schedule in (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble) and number % rounds:
        raise Broken(
            f"{named} do not fill the {rounds} rounds that "
            f"{facts.show('parallelism.pipeline_parallel_schedule')} makes of them on "
            f"{facts.show('parallelism.pipeline_parallel_degree')}; "
            f"use training.local_batch_size = {facts.pp * rounds * facts.microbatch}"
        )


def split_backward_is_possible(facts: Facts) -> None:
    """A zero-bubble schedule goes back twice: for inputs, and later for weights."""
    if facts.pp == 1 or _schedule(facts) not in _SPLIT:
        return
    twice = f"{facts.show('parallelism.pipeline_parallel_schedule')} runs two, for inputs and for weights"
    if isinstance(facts.trainer.activation_checkpoint, SelectiveAC.Config):
        raise Broken(
            f"activation_checkpoint.mode (selective) keeps activations for one backward, and {twice}; "
            "use mode = 'full' or 'none', or 'Interleaved1F1B'"
        )
    if facts.trainer.compile.enable and "model" in facts.trainer.compile.components:
        raise Broken(
            f"compile.enable with 'model' in compile.components makes layers with one backward, and {twice}; "
            "switch it off, or use 'Interleaved1F1B'"
        )


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
    sequence_reaches_tp_ranks,
    batch_divides,
    heads_divide_over_tp,
    sequence_fits_rope,
    context_parallel_has_attention,
    sequence_divides_over_cp,
    pipeline_has_stages,
    microbatches_suit_the_schedule,
    split_backward_is_possible,
    fsdp_splits_experts_evenly,
)
