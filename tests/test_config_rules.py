"""Every rule across keys: arguments that it lets pass, arguments that it refuses, and in which words."""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torchtitan.tools import utils

from titan_moe import models
from titan_moe.config import ConfigError, Job, load
from titan_moe.config.rules import RULES
from titan_moe.config.rules.run import RANGES
from titan_moe.config.sections import every_key
from titan_moe.data import TOKENIZER_DIR
from titan_moe.models.attention import PackedSDPA
from titan_moe.moe import MoE


def _experts(**changes: Any) -> Callable[[Any], Any]:
    """Edits the experts and the router of every MoE layer of a spec."""

    def _edit(spec: Any) -> Any:
        for _, layer, _, _ in spec.model.traverse(MoE.Config):
            for name, value in changes.items():
                owner = layer.router if hasattr(layer.router, name) else layer.routed_experts.inner_experts
                setattr(owner, name, value)
        return spec

    return _edit


def _model(**changes: Any) -> Callable[[Any], Any]:
    def _edit(spec: Any) -> Any:
        for name, value in changes.items():
            setattr(spec.model, name, value)
        return spec

    return _edit


def _attention(**changes: Any) -> Callable[[Any], Any]:
    def _edit(spec: Any) -> Any:
        for layer in spec.model.layers:
            for name, value in changes.items():
                setattr(layer.attention, name, value)
        return spec

    return _edit


_P = "--parallelism."
_PP2 = f"{_P}pipeline_parallel_degree 2"
_LOOPED = f"{_PP2} {_P}pipeline_parallel_schedule Interleaved1F1B"
_GROUPS = "--optimizer.param_groups"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments that pass, arguments that fail, and what the failure says; edits change the flavor."""

    passes: str = ""
    fails: str = ""
    says: str
    edit_passing: Callable[[Any], Any] = lambda spec: spec
    edit_failing: Callable[[Any], Any] = lambda spec: spec
    ranks: int = 4
    failing_ranks: int | None = None
    device: str = utils.device_type


CASES: dict[str, list[Case]] = {
    "numbers_are_in_range": [
        Case(
            passes="--metrics.log_freq 1",
            fails="--metrics.log_freq 0",
            says=r"metrics.log_freq \(0\) must be at least 1",
        ),
        Case(
            passes="--lr_scheduler.decay_ratio 1",
            fails="--lr_scheduler.decay_ratio 1.5",
            says=r"lr_scheduler.decay_ratio \(1.5\) must be between 0 and 1",
        ),
    ],
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
            edit_failing=_attention(n_heads=6),
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
    "sequence_divides_over_cp": [
        Case(
            passes="--training.seq_len 127",
            fails=f"--training.seq_len 127 {_P}context_parallel_degree 4",
            says=r"seq_len \(127\) must be a multiple of 2 \* .*\(4\) = 8; use 120 or 128",
        ),
    ],
    "context_parallel_has_attention": [
        Case(
            fails=f"{_P}context_parallel_degree 2",
            edit_failing=_attention(inner_attention=PackedSDPA.Config()),
            says=r"context_parallel_degree \(2\) needs FlexAttention or plain SDPA",
        ),
        Case(
            passes=f"{_P}context_parallel_load_balancer none",
            fails=f"{_P}context_parallel_load_balancer headtial",
            says=r"load_balancer \(headtial\) must be 'headtail', 'ptrr' or 'none'",
        ),
        Case(
            passes=f"{_P}context_parallel_degree 2",
            edit_passing=_attention(inner_attention=SimpleNamespace()),
            fails=f"{_P}context_parallel_degree 2 {_P}context_parallel_load_balancer ptrr",
            edit_failing=_attention(inner_attention=SimpleNamespace()),
            says=r"load_balancer \(ptrr\) needs FlexAttention",
        ),
    ],
    "pipeline_has_stages": [
        Case(
            passes=_PP2,
            fails=_PP2,
            edit_failing=_model(enable_weight_tying=True),
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
            passes=f"{_PP2} {_P}pipeline_parallel_layers_per_stage 4",
            fails=f"{_PP2} {_P}pipeline_parallel_layers_per_stage 2",
            says=r"layers_per_stage \(2\) makes 4 stages of 8 layers, .* wants exactly 1 per rank; use 4",
        ),
        Case(
            passes=f"{_LOOPED} {_P}pipeline_parallel_layers_per_stage 2",
            fails=f"{_LOOPED} {_P}pipeline_parallel_layers_per_stage 4",
            says=r"layers_per_stage \(4\) makes 2 stages of 8 layers, .* wants 2 or more per rank; use 2",
        ),
        Case(
            passes=f"{_P}pipeline_parallel_degree 8",
            ranks=8,
            fails=f"{_P}pipeline_parallel_degree 16",
            failing_ranks=16,
            says=r"pipeline_parallel_degree \(16\) makes 16 stages for the 8 layers",
        ),
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
            edit_passing=_experts(top_k=8),
            edit_failing=_experts(top_k=9),
            says=r"top_k \(9\) .* num_experts \(8\)",
        ),
    ],
    "groups_fit": [
        Case(
            edit_passing=_experts(num_expert_groups=4, num_limited_groups=2),
            edit_failing=_experts(num_expert_groups=3, num_limited_groups=2),
            says=r"num_expert_groups \(3\) must divide num_experts \(8\)",
        ),
        Case(edit_failing=_experts(num_expert_groups=8, num_limited_groups=2), says="groups of 2 or more"),
        Case(
            edit_failing=_experts(num_expert_groups=2, num_limited_groups=3),
            says=r"num_limited_groups \(3\) must be",
        ),
        Case(edit_failing=_experts(num_expert_groups=2), says=r"num_limited_groups \(None\) must be"),
        Case(
            edit_failing=_experts(num_expert_groups=4, num_limited_groups=1),
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
    "grouped_matmul_is_aligned": [
        Case(
            passes=f"{_P}tensor_parallel_degree 4 --training.mixed_precision_param float32",
            edit_passing=_experts(hidden_dim=48),
            fails=f"{_P}tensor_parallel_degree 4",
            edit_failing=_experts(hidden_dim=48),
            says=r"hidden_dim per rank \(12\) \* 2 bytes of .*_param \(bfloat16\) .*multiple of 16",
        ),
        Case(edit_failing=_experts(dim=252), says=r"dim \(252\) \* 2 bytes"),
        Case(
            passes=f"{_P}tensor_parallel_degree 4 {_P}expert_parallel_degree 4",
            edit_passing=_experts(hidden_dim=24),
            fails=f"{_P}tensor_parallel_degree 4",
            edit_failing=_experts(hidden_dim=250),
            says=r"tensor_parallel_degree \(4\) must divide the hidden_dim \(250\)",
        ),
    ],
    "profiler_cycle_fits": [
        Case(
            passes="--profiler.profile_freq 3",
            fails="--profiler.profile_freq 3 --profiler.enable_profiling",
            says=r"profile_freq \(3\) must be at least .*warmup \(3\) \+ .*active \(1\) = 4",
        ),
    ],
    "loss_chunks_divide": [
        Case(
            passes="--training.seq_len 127",
            fails="--training.seq_len 127 --loss.name chunked_cross_entropy",
            says=r"seq_len \(127\) / .* \(1\) must be a multiple of loss.num_chunks \(8\)",
        ),
    ],
    "compile_knows_its_components": [
        Case(
            passes="--compile.components '[\"loss\"]'",
            fails="--compile.components '[\"los\"]'",
            says=r"components \('los'\)",
        ),
    ],
    "cuda_graphs_have_no_host_sync": [
        Case(
            passes="--moe.dispatcher local --training.no-disable_cuda_graphs",
            fails="--moe.dispatcher all_to_all --training.no-disable_cuda_graphs",
            device="cuda",
            says=r"disable_cuda_graphs \(false\): moe.dispatcher 'all_to_all' reads its splits on the host",
        ),
        Case(fails="--training.no-disable_cuda_graphs", device="cpu", says=r"\(false\) on a cpu machine"),
    ],
    "offload_has_a_device": [
        Case(
            passes="",
            fails="--training.enable_cpu_offload",
            device="cpu",
            says="enable_cpu_offload .* needs a GPU",
        ),
        Case(passes="--training.enable_cpu_offload", fails="--x 1", device="cuda", says="x is not a key"),
        Case(
            fails="--checkpoint.async_mode async_with_pinned_mem",
            device="cpu",
            says="needs a GPU; use 'async'",
        ),
    ],
    "comm_mode_moves_real_tokens": [
        Case(
            passes="--comm.mode default", fails="--comm.mode fake_backend", says=r"comm.mode \(fake_backend\)"
        ),
        Case(fails="--comm.mode local_tensor", says=r"comm.mode \(local_tensor\)"),
        Case(fails="--comm.mode torchcomms", says="needs the package torchcomms"),
    ],
    "debug_switches_do_something": [
        Case(fails="--debug.spmd_typechecking", says="spmd_typechecking .* checks nothing under"),
    ],
    "packages_are_installed": [
        Case(fails="--metrics.enable_wandb", says="metrics.enable_wandb .* needs the package wandb"),
    ],
    "optimizer_accepts_its_arguments": [
        Case(
            passes="--optimizer.lr 0.1",
            fails="--optimizer.lr -0.1",
            says=r"optimizer.lr -0.1.*: Invalid learning rate",
        ),
        Case(
            passes=f'{_GROUPS} \'[{{pattern=".", optimizer_name="Adam", optimizer_kwargs={{lr=1}}}}]\'',
            fails=f'{_GROUPS} \'[{{pattern=".", optimizer_name="Adam", optimizer_kwargs={{rate=1}}}}]\'',
            says=r"optimizer.param_groups\[0\] \(Adam, rate 1\): .*unexpected keyword argument 'rate'",
        ),
        Case(
            fails=f'{_GROUPS} \'[{{pattern="(", optimizer_name="Adam"}}]\'',
            says=r"param_groups\[0\] \(Adam\): pattern '\(' is not a regular expression",
        ),
        Case(
            fails=f'{_GROUPS} \'[{{pattern=".", optimizer_name="Lion"}}]\'',
            says=r"\(Lion\): torchtitan has no",
        ),
    ],
    "seed_checkpoint_is_unsharded": [
        Case(
            passes="--checkpoint.create_seed_checkpoint --checkpoint.enable",
            ranks=1,
            fails="--checkpoint.create_seed_checkpoint --checkpoint.enable",
            failing_ranks=2,
            says=r"create_seed_checkpoint \(true\) wants 1 rank, not 2; run NGPU=1",
        ),
        Case(fails="--checkpoint.create_seed_checkpoint", ranks=1, says=r"needs checkpoint.enable \(false\)"),
    ],
    "checkpoint_is_consistent": [
        Case(
            passes="--checkpoint.initial_load_path /nope",  # not looked at: checkpoint.enable is off
            fails="--checkpoint.initial_load_path /nope --checkpoint.enable",
            says=r"initial_load_path \(/nope\): no such folder",
        ),
        Case(
            passes="--checkpoint.enable --checkpoint.load_only",
            fails="--checkpoint.enable --checkpoint.load_only --checkpoint.enable_first_step_checkpoint",
            says="load_only .* saves nothing, but checkpoint.enable_first_step_checkpoint",
        ),
        Case(
            passes="--checkpoint.enable --checkpoint.last_save_in_hf",
            fails="--checkpoint.enable --checkpoint.last_save_in_hf",
            edit_failing=lambda spec: dataclasses.replace(spec, state_dict_adapter=None),
            says="has no Hugging Face adapter",
        ),
    ],
    "dump_folder_is_a_folder": [
        Case(
            passes="--dump_folder /tmp",
            fails=f"--dump_folder {__file__}",
            says=r"dump_folder \(.*\) is a file",
        ),
    ],
    "data_exists": [
        Case(
            passes=f"--dataloader.source files --dataloader.paths '[\"{Path(__file__).parent}/*.py\"]'",
            fails="--dataloader.source files --dataloader.paths '[\"/nope/*.txt\"]'",
            says=r"dataloader.paths \('/nope/\*.txt'\) matches no file",
        ),
        Case(
            # Validation is off, so its dataset is not looked at.
            passes="--validator.dataloader.source huggingface --validator.dataloader.dataset c5",
            fails="--dataloader.source huggingface --dataloader.dataset c4_tes",
            says=r"dataloader.dataset \('c4_tes'\) is not a dataset .*; did you mean 'c4_test'\?",
        ),
        Case(
            passes="--dataloader.source huggingface --dataloader.dataset_path /data",
            fails="--dataloader.source huggingface",
            says=r"dataset \('c4_test'\) is tests/assets/c4_test .*; set dataloader.dataset_path",
        ),
    ],
    "tokenizer_fits_the_model": [
        Case(
            passes=f"--hf_assets_path {TOKENIZER_DIR}",
            fails="--hf_assets_path /nope",
            says=r"hf_assets_path \(/nope\) holds no tokenizer",
        ),
        Case(
            edit_passing=_model(vocab_size=2048),
            edit_failing=_model(vocab_size=2047),
            says=r"the tokenizer has 2048 ids, more than the vocab_size \(2047\)",
        ),
    ],
}


def _load(tmp_path: Path, arguments: str, ranks: int) -> Job:
    file = tmp_path / "x.toml"
    file.write_text('[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n')
    return load([str(file), *shlex.split(arguments)], world_size=ranks)


def test_every_rule_has_a_passing_and_a_failing_case() -> None:
    assert [rule.__name__ for rule in RULES] == list(CASES)
    assert all(rule.__doc__ for rule in RULES)
    assert set(RANGES) <= {f"{section}.{key}" for section, key in every_key()}


@pytest.mark.parametrize(
    ("rule", "number"), [(rule, number) for rule, cases in CASES.items() for number in range(len(cases))]
)
def test_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, number: int) -> None:
    case, build_spec = CASES[rule][number], models.build_spec
    monkeypatch.setattr(utils, "device_type", case.device)
    if rule == "packages_are_installed":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    monkeypatch.setattr(models, "build_spec", lambda *a, **k: case.edit_passing(build_spec(*a, **k)))
    _load(tmp_path, case.passes, case.ranks)
    monkeypatch.setattr(models, "build_spec", lambda *a, **k: case.edit_failing(build_spec(*a, **k)))
    with pytest.raises(ConfigError, match=case.says):
        _load(tmp_path, case.fails, case.failing_ranks or case.ranks)
