"""Expert load and traffic: counting both, and balancing the load without an auxiliary loss."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_moe.layer.dispatch.base import Traffic
from titan_moe.layer.names import plain_name
from titan_moe.layer.recomputation import is_recomputing


@torch.no_grad()
def count_tokens(
    tokens_per_expert_E: torch.Tensor, num_tokens_per_expert_E: torch.Tensor, *, training: bool
) -> None:
    """Adds a forward's counts to the running ones: once per training forward.

    Neither eval nor the recomputation of activation checkpointing counts, so the numbers are the
    same under AC none, selective and full. The padding of uneven shards is never routed, so never counted;
    tokens that a replay marks as padding are routed, and not counted.
    """
    if training and not is_recomputing():
        tokens_per_expert_E.add_(num_tokens_per_expert_E)


@torch.no_grad()
def count_traffic(counters: torch.Tensor, traffic: Traffic, *, training: bool) -> None:
    """Adds what a forward sends to the running sums, when ``count_tokens`` would count it.

    Args:
        counters: int64, one per field of Traffic.
    """
    if training and not is_recomputing():
        for counter, amount in zip(counters.unbind(), traffic, strict=True):
            counter.add_(amount)


class LoadBalancer:
    """Moves each layer's expert bias towards balance before each optimizer step (arXiv 2408.15664).

    ``bias += coeff * sign(mean load - load)``, made zero-mean, from the global counts since the last
    step. Integer sums make the result the same on every mesh.

    Attributes:
        last_load: per MoE layer of this pipeline stage: int64 ``(E,)`` global counts of the last step.
        last_traffic: int64, one per field of Traffic: of the last step, summed over layers and ranks.
    """

    def __init__(self, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        self.layers = {fqn: moe for part in model_parts for fqn, moe in _moe_layers(part)}
        self.groups = [parallel_dims.get_mesh("loss").get_group()] if parallel_dims.dp_cp_enabled else []
        # With EP on, TP ranks route different tokens; with EP off, all of them count the same ones.
        if parallel_dims.tp_enabled and parallel_dims.ep_enabled:
            self.groups.append(parallel_dims.get_mesh("tp").get_group())
        self.last_load: dict[str, torch.Tensor] = {}
        self.last_traffic = torch.zeros(len(Traffic._fields), dtype=torch.int64)

    @torch.no_grad()
    def step(self, *_: Any) -> None:
        """The optimizer's hook before a step. It is collective over the data and TP axes of this stage."""
        if not self.layers:
            return
        counts_by_layer = [moe.tokens_per_expert_E for moe in self.layers.values()]
        traffic_by_layer = [moe.traffic for moe in self.layers.values()]
        counters = [*counts_by_layer, torch.stack(traffic_by_layer).sum(0)]
        total = torch.cat(counters)
        for group in self.groups:
            dist.all_reduce(total, group=group)
        *loads, self.last_traffic = total.split([counter.numel() for counter in counters])
        for (fqn, moe), load_E in zip(self.layers.items(), loads, strict=True):
            self.last_load[fqn] = load_E
            moe.tokens_per_expert_E.zero_()
            moe.traffic.zero_()
            if moe.load_balance_coeff is not None:
                moe.expert_bias_E.add_(_bias_delta(load_E, moe.load_balance_coeff))


def attach_load_balancer(optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
    """A torchtitan ModelSpec's ``post_optimizer_build_fn``: balances from now on.

    The balancer, and with it the load, is ``optimizers.load_balancer`` afterwards.
    """
    optimizers.load_balancer = LoadBalancer(model_parts, parallel_dims)
    optimizers.register_step_pre_hook(optimizers.load_balancer.step)


def _bias_delta(load_E: torch.Tensor, coeff: float) -> torch.Tensor:
    # sign(mean - load) without a division: exact for any count.
    delta_E = coeff * torch.sign(load_E.sum() - load_E * load_E.numel()).float()
    return delta_E - delta_E.mean()


def _moe_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Every module that counts tokens, MTP blocks included, by its name without wrappers."""
    return [
        (plain_name(fqn), module)
        for fqn, module in model.named_modules()
        if hasattr(module, "tokens_per_expert_E")
    ]
