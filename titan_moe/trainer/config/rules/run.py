"""Rules about everything else: ranges, files, tokenizer, loss, optimizer, checkpoint, packages."""

import glob
import importlib.util
import json
import os
import re
from pathlib import Path

import torch
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader
from torchtitan.tools import filesystem

from titan_moe.models.hugging_face.config_json import (
    HuggingFaceError,
    has_expert_bias,
    hf_config,
    routes_by_bias,
)
from titan_moe.trainer.config.errors import nearest
from titan_moe.trainer.config.rules.facts import Broken, Facts
from titan_moe.trainer.config.sections import OptimizerSection
from titan_moe.trainer.data import TextDataLoader

# Numbers that torchtitan would divide by, wait for or index with: key -> (lowest, highest).
RANGES: dict[str, tuple[float, float | None]] = {
    "activation_checkpoint.memory_budget": (0, 1),
    "checkpoint.load_step": (-1, None),
    "comm.init_timeout_seconds": (1, None),
    "comm.trace_buf_size": (0, None),
    "comm.train_timeout_seconds": (1, None),
    "dataloader.num_workers": (0, None),
    "loss.num_chunks": (1, None),
    "lr_scheduler.decay_ratio": (0, 1),
    "lr_scheduler.min_lr_factor": (0, 1),
    "lr_scheduler.total_steps": (1, None),
    "lr_scheduler.warmup_steps": (0, None),
    "metrics.log_freq": (1, None),
    "parallelism.pipeline_parallel_first_stage_less_layers": (0, None),
    "parallelism.pipeline_parallel_last_stage_less_layers": (0, None),
    "parallelism.pipeline_parallel_layers_per_stage": (1, None),
    "profiler.memory_snapshot_freq": (1, None),
    "training.gc_freq": (1, None),
    "training.local_batch_size": (1, None),
    "training.max_norm": (0, None),
    "training.seq_len": (1, None),
    "training.steps": (1, None),
    "validator.dataloader.num_workers": (0, None),
    "validator.freq": (1, None),
}

_PACKAGES = {
    "metrics.enable_tensorboard": "tensorboard",
    "metrics.enable_wandb": "wandb",
}


def numbers_are_in_range(facts: Facts) -> None:
    """Every key of RANGES is between its limits."""
    for key, (lowest, highest) in RANGES.items():
        value = facts.value(key)
        if value is not None and not lowest <= value <= (value if highest is None else highest):
            limits = f"at least {lowest}" if highest is None else f"between {lowest} and {highest}"
            raise Broken(f"{facts.show(key)} must be {limits}")


def profiler_cycle_fits(facts: Facts) -> None:
    """torchtitan profiles once per profile_freq steps: warm-up and active steps fit in."""
    busy = facts.trainer.profiler.profiler_warmup + facts.trainer.profiler.profiler_active
    if facts.trainer.profiler.enable_profiling and facts.trainer.profiler.profile_freq < busy:
        raise Broken(
            f"{facts.show('profiler.profile_freq')} must be at least "
            f"{facts.show('profiler.profiler_warmup')} + {facts.show('profiler.profiler_active')} = {busy}"
        )


def loss_chunks_divide(facts: Facts) -> None:
    """The chunked loss splits each CP rank's sequence into equal chunks."""
    seq_len = facts.training.seq_len // facts.cp
    if isinstance(facts.trainer.loss, ChunkedLossWrapper.Config) and seq_len % facts.trainer.loss.num_chunks:
        raise Broken(
            f"{facts.show('training.seq_len')} / {facts.show('parallelism.context_parallel_degree')} must be "
            f"a multiple of {facts.show('loss.num_chunks')}; change one, or use loss.name = 'cross_entropy'"
        )


def compile_knows_its_components(facts: Facts) -> None:
    """torchtitan ignores a component it does not know."""
    for component in facts.trainer.compile.components:
        if component not in ("model", "loss"):
            raise Broken(f"compile.components ({component!r}) may hold 'model' and 'loss'")


def cuda_graphs_have_no_host_sync(facts: Facts) -> None:
    """A graph cannot wait for the host in the middle."""
    if facts.training.disable_cuda_graphs:
        return
    name = facts.plan.moe.dispatcher
    if facts.device != "cuda":
        raise Broken(f"training.disable_cuda_graphs (false) on a {facts.device} machine; remove the key")
    if facts.dispatcher.needs_host_sync:
        raise Broken(
            f"training.disable_cuda_graphs (false): moe.dispatcher {name!r} reads its splits on the host, "
            "which a CUDA graph cannot hold; remove the key"
        )


def offload_has_a_device(facts: Facts) -> None:
    """CPU offload and pinned memory move data between a GPU and its host."""
    if facts.device != "cpu":
        return
    if facts.training.enable_cpu_offload:
        raise Broken("training.enable_cpu_offload (true) needs a GPU to offload from; remove the key")
    if facts.value("checkpoint.async_mode") == "async_with_pinned_mem":
        raise Broken(f"{facts.show('checkpoint.async_mode')} needs a GPU; use 'async'")


def comm_mode_moves_real_tokens(facts: Facts) -> None:
    """Dispatch exchanges token counts; a fake backend answers with garbage."""
    mode = facts.trainer.comm.mode
    if mode in ("fake_backend", "local_tensor"):
        raise Broken(
            f"{facts.show('comm.mode')} exchanges no data, and dispatch sizes its buffers by data; "
            "use 'default'"
        )
    if mode == "torchcomms" and importlib.util.find_spec("torchcomms") is None:
        raise Broken(f"{facts.show('comm.mode')} needs the package torchcomms; install it or use 'default'")


def debug_switches_do_something(facts: Facts) -> None:
    """A check that never runs must not look as if it had passed."""
    if facts.trainer.debug.spmd_typechecking:
        raise Broken(
            "debug.spmd_typechecking (true) checks nothing under parallelism.spmd_backend "
            "'partial_dtensor'; remove it"
        )


def packages_are_installed(facts: Facts) -> None:
    """Optional loggers, before any rank imports them."""
    for key, package in _PACKAGES.items():
        if facts.value(key) and importlib.util.find_spec(package) is None:
            raise Broken(
                f"{key} (true) needs the package {package}: pip install {package}, or remove the key"
            )


def optimizer_accepts_its_arguments(facts: Facts) -> None:
    """Each group's regex compiles, its optimizer exists and takes these arguments: asked of torch itself."""
    short = not OptimizerSection.of(facts.trainer.optimizer).param_groups
    for i, group in enumerate(facts.trainer.optimizer.param_groups):
        prefix = "optimizer." if short else ""
        arguments = "".join(
            f", {prefix}{name} {_listed(value)}" for name, value in group.optimizer_kwargs.items()
        )
        where = (
            f"{'optimizer' if short else f'optimizer.param_groups[{i}]'} ({group.optimizer_name}{arguments})"
        )
        try:
            re.compile(group.pattern)
            factory = OptimizersContainer._resolve_optimizer_factory(group.optimizer_name)
            if factory in (torch.optim.Adam, torch.optim.AdamW):
                factory([torch.zeros(1, requires_grad=True)], **group.optimizer_kwargs)
        except re.error as error:
            raise Broken(f"{where}: pattern {group.pattern!r} is not a regular expression: {error}") from None
        except NotImplementedError:
            raise Broken(f"{where}: torchtitan has no optimizer of that name; use AdamW or Adam") from None
        except (ValueError, TypeError) as error:
            raise Broken(f"{where}: {error}") from None


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def seed_checkpoint_is_unsharded(facts: Facts) -> None:
    """A seed checkpoint is written by one rank, before any training."""
    checkpoint = facts.trainer.checkpoint
    if not checkpoint.create_seed_checkpoint:
        return
    if facts.world_size != 1:
        raise Broken(
            f"checkpoint.create_seed_checkpoint (true) wants 1 rank, not {facts.world_size}; run NGPU=1"
        )
    if not checkpoint.enable:
        raise Broken(
            "checkpoint.create_seed_checkpoint (true) needs checkpoint.enable (false); set it to true"
        )


def checkpoint_is_consistent(facts: Facts) -> None:
    """What to load is there, Hugging Face files have an adapter, and load_only is not asked to save."""
    checkpoint = facts.trainer.checkpoint
    if not checkpoint.enable:
        return
    if checkpoint.load_only and checkpoint.enable_first_step_checkpoint:
        raise Broken(
            "checkpoint.load_only (true) saves nothing, but checkpoint.enable_first_step_checkpoint (true) "
            "wants to; remove one"
        )
    path = checkpoint.initial_load_path
    if path and not filesystem.is_remote(path) and not os.path.isdir(path):
        raise Broken(f"{facts.show('checkpoint.initial_load_path')}: no such folder")
    for key in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(checkpoint, key) and facts.plan.spec.state_dict_adapter is None:
            raise Broken(
                f"checkpoint.{key} (true): {facts.flavor} has no Hugging Face adapter; remove the key"
            )


def last_save_has_a_hugging_face_form(facts: Facts) -> None:
    """config.json can say what the model computes, and the format has a place for the expert bias."""
    checkpoint = facts.trainer.checkpoint
    if not (checkpoint.enable and checkpoint.last_save_in_hf):
        return
    try:
        hf_config(facts.model)
    except HuggingFaceError as error:
        raise Broken(f"checkpoint.last_save_in_hf (true): {error}") from None
    if has_expert_bias(facts.model) and not routes_by_bias(facts.model):
        coeff = next(c.load_balance_coeff for _, c in facts.moe_layers if c.load_balance_coeff is not None)
        raise Broken(
            f"checkpoint.last_save_in_hf (true): the expert bias (moe.load_balance_coeff, {coeff}) takes "
            f"part in routing, and in Hugging Face's form of {facts.flavor} it has no place; train with "
            "moe.load_balance_coeff = 'none', or remove the key and export with --drop-expert-bias"
        )


def dump_folder_is_a_folder(facts: Facts) -> None:
    """Every rank writes below it."""
    path = facts.trainer.dump_folder
    if os.path.exists(path) and not os.path.isdir(path):
        raise Broken(f"dump_folder ({path}) is a file; name a folder")


def data_exists(facts: Facts) -> None:
    """Local files are there, and Hugging Face datasets are ones that torchtitan knows."""
    sections = {"dataloader": facts.trainer.dataloader}
    if facts.trainer.validator.enable:
        sections["validator.dataloader"] = facts.trainer.validator.dataloader
    for name, config in sections.items():
        if isinstance(config, TextDataLoader.Config):
            for pattern in config.paths:
                path = os.path.expanduser(pattern)
                if not os.path.isfile(path) and not any(
                    map(os.path.isfile, glob.iglob(path, recursive=True))
                ):
                    raise Broken(f"{name}.paths ({pattern!r}) matches no file under {os.getcwd()}")
        elif isinstance(config, HuggingFaceTextDataLoader.Config):
            _dataset_exists(name, config)


def _dataset_exists(name: str, config: HuggingFaceTextDataLoader.Config) -> None:
    dataset = DATASETS.get(config.dataset.lower())
    if dataset is None:
        there = f"there are: {', '.join(DATASETS)}"
        raise Broken(
            f"{name}.dataset ({config.dataset!r}) is not a dataset of torchtitan ({there})"
            f"{nearest(config.dataset, DATASETS)}"
        )
    if dataset.path.startswith("tests/") and not config.dataset_path and not os.path.exists(dataset.path):
        raise Broken(
            f"{name}.dataset ({config.dataset!r}) is {dataset.path} of torchtitan's repository, which is not "
            f"here; set {name}.dataset_path"
        )


def tokenizer_fits_the_model(facts: Facts) -> None:
    """There is a tokenizer, and the embedding has a row for each of its ids."""
    folder = Path(facts.trainer.hf_assets_path)
    names = ("tokenizer.json", "vocab.json", "vocab.txt")
    if not any((folder / name).is_file() for name in names):
        raise Broken(
            f"hf_assets_path ({folder}) holds no tokenizer ({', '.join(names)}); name a tokenizer's folder"
        )
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        return
    try:
        needed = 1 + _highest_id(json.loads(tokenizer.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"hf_assets_path ({folder}): tokenizer.json is not a tokenizer ({error!r})") from None
    if needed > facts.model.vocab_size:
        raise Broken(
            f"hf_assets_path ({folder}): the tokenizer has {needed} ids, more than the vocab_size "
            f"({facts.model.vocab_size}) of {facts.flavor}; use that model's own tokenizer"
        )


def _highest_id(tokenizer: dict) -> int:
    vocab = tokenizer["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))  # Unigram's is a list
    return max(max(ids), *(token["id"] for token in tokenizer.get("added_tokens", [])), 0)


RANGES_FIRST = (numbers_are_in_range,)
RULES = (
    profiler_cycle_fits,
    loss_chunks_divide,
    compile_knows_its_components,
    cuda_graphs_have_no_host_sync,
    offload_has_a_device,
    comm_mode_moves_real_tokens,
    debug_switches_do_something,
    packages_are_installed,
    optimizer_accepts_its_arguments,
    seed_checkpoint_is_unsharded,
    checkpoint_is_consistent,
    last_save_has_a_hugging_face_form,
    dump_folder_is_a_folder,
    data_exists,
    tokenizer_fits_the_model,
)
