"""Rules about everything else: what each lets pass, what it refuses, and in which words."""

import dataclasses
from pathlib import Path

import pytest

from tests.config_rule_case import Case, experts, model, rows
from titan_moe.trainer.config.rules import RULES, mesh, numerics, replay, run, stock
from titan_moe.trainer.config.rules import experts as expert_rules
from titan_moe.trainer.config.sections import every_key
from titan_moe.trainer.data import TOKENIZER_DIR

_GROUPS = "--optimizer.param_groups"
_IN_HF = "--checkpoint.enable --checkpoint.last_save_in_hf --checkpoint.last_save_model_only"

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
            passes=f"{_IN_HF} --moe.load_balance_coeff none --model.norm_eps 1e-6",
            fails=_IN_HF,
            edit_failing=lambda spec: dataclasses.replace(spec, state_dict_adapter=None),
            says="has no Hugging Face adapter",
        ),
    ],
    "last_save_has_a_hugging_face_form": [
        Case(
            passes=f"{_IN_HF} --model.norm_eps 1e-6 --moe.load_balance_coeff none",
            fails=f"{_IN_HF} --model.norm_eps 1e-6",
            says=r"last_save_in_hf \(true\): the expert bias \(moe.load_balance_coeff, 0.001\) takes part .*"
            r"debugmodel it has no place; train with moe.load_balance_coeff = 'none'",
        ),
        Case(
            # The router of DeepSeek-V3 is a sigmoid, and Hugging Face has its bias.
            passes=f"{_IN_HF} --model.norm_eps 1e-6",
            edit_passing=experts(score_func="sigmoid"),
            fails=f"{_IN_HF} --model.norm_eps 1e-6 --model.name qwen3_moe",
            says="in Hugging Face's form of model.flavor qwen3_moe/debugmodel it has no place",
        ),
        Case(
            passes="--checkpoint.last_save_in_hf --checkpoint.last_save_model_only",  # not enabled
            fails=f"{_IN_HF} --moe.load_balance_coeff none",
            says=r"last_save_in_hf \(true\): kv_norm.eps .*set model.norm_eps = 1e-06",
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
            edit_passing=model(vocab_size=2048),
            edit_failing=model(vocab_size=2047),
            says=r"the tokenizer has 2048 ids, more than the vocab_size \(2047\)",
        ),
    ],
}


def test_every_rule_has_cases() -> None:
    assert [rule.__name__ for rule in (*run.RANGES_FIRST, *run.RULES)] == list(CASES)
    elsewhere = (mesh, expert_rules, replay, stock, numerics)
    assert len(RULES) == len(CASES) + sum(len(module.RULES) for module in elsewhere)
    assert set(run.RANGES) <= {f"{section}.{key}" for section, key in every_key()}


@pytest.mark.parametrize(("rule", "case"), rows(CASES))
def test_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, case: Case) -> None:
    case.run(tmp_path, monkeypatch, rule=rule)
