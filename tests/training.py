"""Bodies for `run_ranks` that run torchtitan's trainer on a shortened debug model."""

import gc
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate

from tests.ranks import RankContext
from titan_moe.layer.moe import MoE
from titan_moe.layer.names import plain_name
from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

NUM_LAYERS = 3  # one dense, two MoE: what repeats is enough once


def train(
    ctx: RankContext,
    argv: list[str],
    reference: str | None = None,
    sabotage: Callable[[list[MoE]], None] | None = None,
    num_layers: int = NUM_LAYERS,
) -> dict[str, Any]:
    """Trains as ``python -m titan_moe.trainer.train`` does, on this body's process group.

    Args:
        argv: Config file and overrides.
        reference: A folder for the whole gradients of the first step, and the whole parameters before it and
            after the last, by name. Where it exists, they are compared with it instead: "gradient_errors" and
            "parameter_errors".
        sabotage: Done to the model's MoE layers before the first step.
        num_layers: The model is cut to these.

    Returns:
        "unequal_starts": names of parameters whose first value has not the reference's bits;
        "records" of metrics.jsonl; "expert_bias" per layer; "first_bias" and "first_load" (counts) per
        layer, after one step; "validation" losses; "gradient_errors" and "parameter_errors" by name: the
        distance relative to the gradient, and to what the parameter moved;
        "replicas_differ": names of parameters that are replicated over TP and do not have the same bits
        there; "none_gradients" of the first step. Under PP a rank tells of its own stages.
    """
    gc.collect()  # torchtitan switches the collector off, and the previous body's trainer is a cycle
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:num_layers]
    trainer = Trainer(Trainer.Config.of(job))
    if sabotage is not None:
        sabotage([m for part in trainer.model_parts for m in part.modules() if isinstance(m, MoE)])
    results: dict[str, Any] = {}
    known = reference is not None and os.path.isdir(reference)
    whole: dict[str, Any] | None = {} if reference is not None else None
    trainer.optimizers.register_step_pre_hook(lambda *_: _watch_first_step(trainer, whole, results))
    results["validation"] = _watch_validation(trainer)
    try:
        if job.trainer.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
        else:
            trainer.train()
        if reference is not None and whole is not None:
            whole["end"] = _whole(trainer)
            results |= _compare(whole, reference) if known else _keep(whole, reference)
    finally:
        trainer.close()
        torch.compiler.reset()  # what a compiled body left would count as recompilations of the next
    records = Path(job.trainer.dump_folder) / "metrics.jsonl"
    results["records"] = (
        [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
    )
    results["expert_bias"] = _expert_bias(trainer)
    results["replicas_differ"] = _replicas_differ(trainer)
    return results


def _watch_validation(trainer: Trainer) -> list[float]:
    """The losses that this rank will be told, as its logger is."""
    processor, told = trainer.metrics_processor, []
    log = processor.logger.log

    def note(metrics: dict[str, Any], step: int) -> None:
        told.extend(value for key, value in metrics.items() if key == "validation_metrics/loss")
        log(metrics, step)

    processor.logger.log = note  # type: ignore[method-assign]
    return told


def _watch_first_step(trainer: Trainer, whole: dict[str, Any] | None, results: dict[str, Any]) -> None:
    if "none_gradients" in results:
        return
    results["none_gradients"] = [name for name, p in _parameters(trainer) if p.grad is None]
    results["first_bias"] = _expert_bias(trainer)
    balancer = getattr(trainer.optimizers, "load_balancer", None)  # None: torchtitan's own layers
    results["first_load"] = (
        {fqn: load_E.clone() for fqn, load_E in balancer.last_load.items()} if balancer else {}
    )
    if whole is not None:
        whole |= {"start": _whole(trainer), "gradients": _whole(trainer, of_gradients=True)}


def _keep(whole: dict[str, dict[str, torch.Tensor]], reference: str) -> dict[str, Any]:
    """Each rank's own file: under PP it has its stages."""
    os.makedirs(reference, exist_ok=True)
    torch.save(whole, f"{reference}/{dist.get_rank()}.pt")
    return {}


def _compare(whole: dict[str, dict[str, torch.Tensor]], reference: str) -> dict[str, Any]:
    theirs: dict[str, dict[str, torch.Tensor]] = {key: {} for key in whole}
    for file in sorted(Path(reference).iterdir()):
        for key, tensors in torch.load(file, mmap=True).items():
            theirs[key] |= tensors
    return {
        "names": list(theirs["gradients"]),
        "unequal_starts": [
            n for n, ours in whole["start"].items() if not torch.equal(ours, theirs["start"][n])
        ],
        "gradient_errors": {
            name: _distance(ours, theirs["gradients"][name], theirs["gradients"][name])
            for name, ours in whole["gradients"].items()
        },
        "parameter_errors": {
            name: _distance(ours, theirs["end"][name], theirs["end"][name] - theirs["start"][name])
            for name, ours in whole["end"].items()
        },
    }


def _distance(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> float:
    distance = ((ours - theirs).norm() / scale.norm().clamp_min(1e-30)).item()
    return distance if math.isfinite(distance) else math.inf  # max() would pass over a NaN


def _whole(trainer: Trainer, *, of_gradients: bool = False) -> dict[str, torch.Tensor]:
    """Parameters or gradients of this rank's stages, gathered, by name. Collective."""
    named = {name: p.grad if of_gradients else p.detach() for name, p in _parameters(trainer)}
    held = {name: tensor for name, tensor in named.items() if tensor is not None}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in held.items()}


def _parameters(trainer: Trainer) -> list[tuple[str, Any]]:
    return [(plain_name(name), p) for part in trainer.model_parts for name, p in part.named_parameters()]


def _expert_bias(trainer: Trainer) -> dict[str, torch.Tensor]:
    balancer = getattr(trainer.optimizers, "load_balancer", None)
    return {fqn: moe.expert_bias_E.clone() for fqn, moe in balancer.layers.items()} if balancer else {}


def _replicas_differ(trainer: Trainer) -> list[str]:
    tp = trainer.parallel_dims.get_optional_mesh("tp")
    if tp is None:
        return []
    found = []
    for name, parameter in _parameters(trainer):
        axes = parameter.device_mesh.mesh_dim_names
        if "tp" in axes and parameter.placements[axes.index("tp")] == Replicate():
            local = parameter.to_local().contiguous()
            copies = [torch.empty_like(local) for _ in range(tp.size())]
            dist.all_gather(copies, local, group=tp.get_group())
            if not all(torch.equal(copy, local) for copy in copies):
                found.append(name)
    return found
