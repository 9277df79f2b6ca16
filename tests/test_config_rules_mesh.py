"""Rules about ranks and experts: what each lets pass, what it refuses, and in which words."""

from pathlib import Path

import pytest
from torchtitan.models.common.attention import VarlenAttention

from tests.config_rule_case import Case, attention, experts, model, rows
from titan_moe.trainer.config.rules import experts as expert_rules
from titan_moe.trainer.config.rules import mesh

_P = "--parallelism."
_PP2 = f"{_P}pipeline_parallel_degree 2"
_LOOPED = f"{_PP2} {_P}pipeline_parallel_schedule Interleaved1F1B"
_DUAL = f"{_PP2} {_P}pipeline_parallel_schedule DualPipeV --activation_checkpoint.mode none"

CASES: dict[str, list[Case]] = {
    "degrees_are_positive": [
        Case(
            passes=f"{_P}data_parallel_shard_degree -1",
            fails=f"{_P}data_parallel_shard_degree 0",
            says=r"data_parallel_shard_degree \(0\) is not a number of ranks; use -1",
        ),
        Case(fails=f"{_P}tensor_parallel_degree -1", says=r"tensor_parallel_degree \(-1\) .*use at least 1"),
    ],
    "degrees_fill_the_world": [
        Case(
            passes=f"{_P}tensor_parallel_degree 2",
            fails=f"{_P}tensor_parallel_degree 3",
            says=r"tensor_parallel_degree \(3\): the other degrees multiply to 3, .* divide the 4 ranks",
        ),
        Case(
            passes=f"{_P}data_parallel_shard_degree 4",
            fails=f"{_P}data_parallel_shard_degree 4 {_P}data_parallel_replicate_degree 2",
            says=r"replicate_degree \(2\), .*shard_degree \(4\): .* to 8 but there are 4 ranks, too few",
        ),
        Case(
            fails=f"{_P}data_parallel_shard_degree 1",
            says="all degrees 1: the degrees multiply to 1 but there are 4",
        ),
    ],
    "expert_parallel_fits_the_mesh": [
        Case(
            passes=f"{_P}expert_parallel_degree 4 {_P}tensor_parallel_degree 2",
            fails=f"{_P}expert_parallel_degree 4 {_P}data_parallel_replicate_degree 2",
            says=r"expert_parallel_degree \(4\) must divide .* = 2 \* 1 \* 1 = 2; use 1 or 2",
        ),
    ],
    "spmd_backend_is_ours": [
        Case(
            passes=f"{_P}spmd_backend partial_dtensor",
            fails=f"{_P}spmd_backend spmd_types",
            says="needs 'partial_dtensor'",
        ),
    ],
    "sequence_reaches_tp_ranks": [
        Case(
            passes=f"--training.seq_len 4 {_P}tensor_parallel_degree 4",
            fails=f"--training.seq_len 3 {_P}tensor_parallel_degree 4",
            says=r"seq_len \(3\) is shorter than parallelism.tensor_parallel_degree \(4\).* use at least 4",
        ),
    ],
    "batch_divides": [
        Case(
            passes="--training.global_batch_size 64",
            fails="--training.global_batch_size 63",
            says=r"batch_size \(63\) must be a multiple of .*local_batch_size \(8\) \* .*\(4\) = 32; use 64",
        ),
        Case(
            passes="--training.global_batch_size -1",
            fails="--training.global_batch_size 0",
            says=r"use 32, or -1",
        ),
    ],
    "heads_divide_over_tp": [
        Case(
            passes=f"{_P}tensor_parallel_degree 4",
            fails=f"{_P}tensor_parallel_degree 4",
            edit_failing=attention(n_heads=6),
            says=r"tensor_parallel_degree \(4\) must divide n_heads \(6\) .*; use 1, 2, 3 or 6",
        ),
    ],
    "sequence_fits_rope": [
        Case(
            passes="--training.seq_len 16384",
            fails="--training.seq_len 16385",
            says=r"seq_len \(16385\) exceeds the RoPE max_seq_len \(16384\)",
        ),
        Case(
            passes=f"--training.seq_len 127 {_P}tensor_parallel_degree 4",
            fails="--training.seq_len 0",
            says="at least 1",
        ),
    ],
    "context_parallel_has_attention": [
        Case(
            passes=f"{_P}context_parallel_degree 2 --training.seq_len 256",
            fails=f"{_P}context_parallel_degree 2 --training.seq_len 256",
            edit_failing=attention(inner_attention=VarlenAttention.Config()),
            says=r"context_parallel_degree \(2\) needs FlexAttention, which .* does not use; use 1",
        ),
        Case(
            passes=f"{_P}context_parallel_load_balancer none",
            fails=f"{_P}context_parallel_load_balancer headtial",
            says=r"load_balancer \(headtial\) must be 'headtail', 'ptrr' or 'none'",
        ),
    ],
    "sequence_divides_over_cp": [
        Case(
            passes="--training.seq_len 127",
            fails=f"--training.seq_len 600 {_P}context_parallel_degree 4",
            says=r"seq_len \(600\) must be a multiple of .*\(4\) \* 128 .* = 512; use 512 or 1024",
        ),
        Case(
            passes=f"--training.seq_len 256 {_P}context_parallel_degree 2",
            fails=f"--training.seq_len 127 {_P}context_parallel_degree 2",
            says=r"= 256; use 256",
        ),
    ],
    "pipeline_has_stages": [
        Case(
            passes=_PP2,
            fails=_PP2,
            edit_failing=model(enable_weight_tying=True),
            says=r"degree \(2\): .* ties its embedding",
        ),
        Case(
            fails=f"{_PP2} {_P}pipeline_parallel_schedule 2F2B",
            says=r"schedule \(2F2B\): Unknown schedule name",
        ),
        Case(
            fails=f"{_PP2} {_P}pipeline_parallel_schedule_csv /nope.csv",
            says=r"csv \(/nope.csv\): no such file",
        ),
        Case(
            passes=f"{_PP2} {_P}pipeline_parallel_schedule gpipe",
            fails=f"{_PP2} {_P}pipeline_parallel_schedule PipelineScheduleMulti",
            says=r"schedule \(PipelineScheduleMulti\) needs parallelism.pipeline_parallel_schedule_csv",
        ),
        Case(
            fails=f"{_P}pipeline_parallel_degree 5 {_P}pipeline_parallel_layers_per_stage 2",
            failing_ranks=5,
            says=r"\(2\) makes 4 stages of 8 layers, .* wants exactly 1 per rank; remove the key",
        ),
        Case(
            passes=f"{_LOOPED} {_P}pipeline_parallel_layers_per_stage 1",
            fails=f"{_DUAL} {_P}pipeline_parallel_layers_per_stage 1",
            says=r"makes 8 stages of 8 layers, .* wants exactly 2 per rank; use 2",
        ),
        Case(
            passes=f"{_PP2} {_P}pipeline_parallel_layers_per_stage 4",
            fails=f"{_PP2} {_P}pipeline_parallel_layers_per_stage 2",
            says=r"layers_per_stage \(2\) makes 4 stages of 8 layers, .* wants exactly 1 per rank; use 4",
        ),
        Case(
            passes=f"{_LOOPED} {_P}pipeline_parallel_layers_per_stage 2",
            fails=f"{_LOOPED} {_P}pipeline_parallel_layers_per_stage 4",
            says=r"layers_per_stage \(4\) makes 2 stages of 8 layers, .* wants at least 2 per rank; use 2",
        ),
        Case(
            passes=f"{_P}pipeline_parallel_degree 8",
            ranks=8,
            fails=f"{_P}pipeline_parallel_degree 16",
            failing_ranks=16,
            says=r"pipeline_parallel_degree \(16\) makes 16 stages for the 8 layers",
        ),
    ],
    "microbatches_suit_the_schedule": [
        Case(
            passes=f"{_PP2} --training.local_batch_size 2",
            fails=f"{_PP2} --training.local_batch_size 1",
            says=r"local_batch_size \(1\) .* = 1 microbatches are fewer than the 2 stages .*; use .* = 2",
        ),
        Case(
            passes=f"{_DUAL} --training.local_batch_size 4",
            fails=f"{_DUAL} --training.local_batch_size 3",
            says=r"= 3 microbatches are fewer than the 4 stages",
        ),
        Case(
            passes=f"{_LOOPED} --training.local_batch_size 8 {_P}pipeline_parallel_microbatch_size 2",
            fails=f"{_LOOPED} --training.local_batch_size 10 {_P}pipeline_parallel_microbatch_size 2",
            says=r"= 5 microbatches do not fill the 2 rounds .*; use training.local_batch_size = 8",
        ),
    ],
    "split_backward_is_possible": [
        Case(
            passes=f"{_LOOPED} --activation_checkpoint.mode selective",
            fails=f"{_PP2} {_P}pipeline_parallel_schedule {schedule} --activation_checkpoint.mode selective",
            says=rf"mode \(selective\) keeps activations for one backward, and .*\({schedule}\) runs two",
        )
        for schedule in ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
    ]
    + [
        Case(
            passes=f"{_LOOPED} --compile.enable",
            fails=f"{_DUAL} --compile.enable",
            says=r"compile.enable with 'model' .* one backward, and .*\(DualPipeV\) runs two",
        )
    ],
    "fsdp_splits_experts_evenly": [
        Case(
            ranks=16,
            fails="--training.steps 1",
            failing_ranks=24,
            says=r"layers.1.moe of .*: 24 FSDP ranks .* its 8 experts .* dim \(256\) .* rank \(256\)",
        ),
        Case(
            passes=f"{_P}expert_parallel_degree 4",
            ranks=64,
            fails=f"{_P}expert_parallel_degree 4",
            failing_ranks=12,
            says="3 FSDP ranks",
        ),
    ],
    "top_k_fits": [
        Case(
            edit_passing=experts(top_k=8),
            edit_failing=experts(top_k=9),
            says=r"top_k \(9\) .* num_experts \(8\)",
        ),
    ],
    "groups_fit": [
        Case(
            edit_passing=experts(num_expert_groups=4, num_limited_groups=2),
            edit_failing=experts(num_expert_groups=3, num_limited_groups=2),
            says=r"num_expert_groups \(3\) must divide num_experts \(8\)",
        ),
        Case(edit_failing=experts(num_expert_groups=8, num_limited_groups=2), says="groups of 2 or more"),
        Case(
            edit_failing=experts(num_expert_groups=2, num_limited_groups=3),
            says=r"num_limited_groups \(3\) must be",
        ),
        Case(edit_failing=experts(num_expert_groups=2), says=r"num_limited_groups \(None\) must be"),
        Case(
            edit_failing=experts(num_expert_groups=4, num_limited_groups=1),
            says=r"top_k \(3\) exceeds the 2 experts of its num_limited_groups \(1\)",
        ),
    ],
    "experts_divide_over_ep": [
        Case(
            passes=f"{_P}expert_parallel_degree 8",
            fails=f"{_P}expert_parallel_degree 16",
            ranks=16,
            says=r"expert_parallel_degree \(16\) must divide the num_experts \(8\) .*; use 1, 2, 4 or 8",
        ),
    ],
    "dispatcher_serves_the_mesh": [
        Case(
            passes="--moe.dispatcher local",
            fails=f"--moe.dispatcher local {_P}expert_parallel_degree 2",
            says=r"moe.dispatcher 'local' cannot serve parallelism.expert_parallel_degree \(2\)",
        ),
        Case(passes="--moe.dispatcher all_to_all", fails="--moe.dispatcher x", says="is not a dispatcher"),
    ],
    "compiled_grouped_matmul_is_bf16": [
        Case(
            passes="--compile.enable",
            fails="--compile.enable --training.mixed_precision_param float32",
            says=r"compile.enable .*mixed_precision_param \(float32\) to be bfloat16",
        ),
    ],
    "grouped_matmul_is_aligned": [
        Case(
            passes=f"{_P}tensor_parallel_degree 4 --training.mixed_precision_param float32",
            edit_passing=experts(hidden_dim=48),
            fails=f"{_P}tensor_parallel_degree 4",
            edit_failing=experts(hidden_dim=48),
            says=r"hidden_dim per rank \(12\) \* 2 bytes of .*_param \(bfloat16\) .*multiple of 16",
        ),
        Case(edit_failing=experts(dim=252), says=r"dim \(252\) \* 2 bytes"),
        Case(
            passes=f"{_P}tensor_parallel_degree 4 {_P}expert_parallel_degree 4",
            edit_passing=experts(hidden_dim=24),
            fails=f"{_P}tensor_parallel_degree 4",
            edit_failing=experts(hidden_dim=250),
            says=r"tensor_parallel_degree \(4\) must divide the hidden_dim \(250\)",
        ),
    ],
}


def test_every_rule_has_cases() -> None:
    assert [rule.__name__ for rule in (*mesh.RULES, *expert_rules.RULES)] == list(CASES)


@pytest.mark.parametrize(("rule", "case"), rows(CASES))
def test_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, case: Case) -> None:
    case.run(tmp_path, monkeypatch, rule=rule)
