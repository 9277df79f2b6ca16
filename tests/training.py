"""Bodies for `run_ranks` that run torchtitan's trainer on a shortened debug model."""

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from tests.ranks import RankContext
from titan_moe.config import load
from titan_moe.moe import MoE
from titan_moe.train import Trainer

NUM_LAYERS = 3  # one dense, two MoE: what repeats is enough once


def train(
    ctx: RankContext,
    argv: list[str],
    gradients: str | None = None,
    sabotage: Callable[[list[MoE]], None] | None = None,
    num_layers: int = NUM_LAYERS,
) -> dict[str, Any]:
    """Trains as ``python -m titan_moe.train`` does, on this body's process group.

    Args:
        argv: Config file and overrides.
        gradients: A file for the whole gradients of the first step, by parameter name. Where it exists,
            they are compared with it instead, and "gradient_errors" says how far off each is.
        sabotage: Done to the model's MoE layers before the first step.
        num_layers: The model is cut to these.

    Returns:
        "records" of metrics.jsonl; "expert_bias" per layer; "first_bias" and "first_load" (counts) per
        layer, after one step;
        "replicas_differ": names of parameters that are replicated over TP and do not have the same bits
        there; "none_gradients" of the first step.
    """
    gc.collect()  # torchtitan switches the collector off, and the previous body's trainer is a cycle
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:num_layers]
    trainer = Trainer(Trainer.Config.of(job))
    if sabotage is not None:
        sabotage([module for module in trainer.model_parts[0].modules() if isinstance(module, MoE)])
    results: dict[str, Any] = {}
    trainer.optimizers.register_step_pre_hook(lambda *_: _watch_first_step(trainer, gradients, results))
    try:
        if job.trainer.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
    finally:
        trainer.close()
    records = Path(job.trainer.dump_folder) / "metrics.jsonl"
    results["records"] = (
        [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    )
    results["expert_bias"] = _expert_bias(trainer)
    results["replicas_differ"] = _replicas_differ(trainer)
    return results


def _watch_first_step(trainer: Trainer, file: str | None, results: dict[str, Any]) -> None:
    if "none_gradients" in results:
        return
    named = {_plain(name): p.grad for name, p in trainer.model_parts[0].named_parameters()}
    results["none_gradients"] = [name for name, gradient in named.items() if gradient is None]
    results["first_bias"] = _expert_bias(trainer)
    balancer = getattr(trainer.optimizers, "load_balancer", None)  # None: torchtitan's own layers
    results["first_load"] = (
        {fqn: load_E.clone() for fqn, load_E in balancer.last_load.items()} if balancer else {}
    )
    if file is None:
        return
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in named.items()}
    if os.path.exists(file):
        expected = torch.load(file)
        assert expected.keys() == whole.keys()
        results["gradient_errors"] = {
            name: ((whole[name] - g).norm() / g.norm().clamp_min(1e-30)).item()
            for name, g in expected.items()
        }
    elif dist.get_rank() == 0:
        torch.save(whole, file)


def _expert_bias(trainer: Trainer) -> dict[str, torch.Tensor]:
    balancer = getattr(trainer.optimizers, "load_balancer", None)
    return {fqn: moe.expert_bias_E.clone() for fqn, moe in balancer.layers.items()} if balancer else {}


def _replicas_differ(trainer: Trainer) -> list[str]:
    tp = trainer.parallel_dims.get_optional_mesh("tp")
    if tp is None:
        return []
    found = []
    for name, parameter in trainer.model_parts[0].named_parameters():
        axes = parameter.device_mesh.mesh_dim_names
        if "tp" in axes and parameter.placements[axes.index("tp")] == Replicate():
            local = parameter.to_local().contiguous()
            copies = [torch.empty_like(local) for _ in range(tp.size())]
            dist.all_gather(copies, local, group=tp.get_group())
            if not all(torch.equal(copy, local) for copy in copies):
                found.append(_plain(name))
    return found


def _plain(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")
