"""The load and the traffic of the last optimizer step, as numbers for a person and for metrics.jsonl."""

import math

from titan_moe.layer.dispatch.base import Traffic
from titan_moe.layer.load_balance import LoadBalancer


def load_report(balancer: LoadBalancer) -> dict[str, dict[str, float]]:
    """Per layer: max / mean load, coefficient of variation, experts without a token. Host sync."""
    return {fqn: load_statistics(load_E.tolist()) for fqn, load_E in balancer.last_load.items()}


def traffic_report(balancer: LoadBalancer) -> dict[str, float]:
    """What the last step's forwards sent, summed over this stage's layers and all ranks. Host sync.

    It has the fields of Traffic, ``tokens``, which are those that count as load, once per layer, and
    ``*_rows_if_uniform``, the rows that as many tokens would send under uniform routing.
    """
    sums: dict[str, float] = {"tokens": 0, "dispatch_rows_if_uniform": 0, "combine_rows_if_uniform": 0}
    for fqn, load_E in balancer.last_load.items():
        dispatcher = balancer.layers[fqn].routed_experts.token_dispatcher
        tokens = load_E.sum().item() / dispatcher.top_k
        uniform = dispatcher.uniform_rows_per_token(dispatcher.limits) if dispatcher.limits else (0, 0)
        amounts = (tokens, *(tokens * rows for rows in uniform))
        sums = {key: sums[key] + amount for key, amount in zip(sums, amounts, strict=True)}
    return Traffic(*balancer.last_traffic.tolist())._asdict() | sums


def load_statistics(tokens_per_expert: list[int]) -> dict[str, float]:
    """max / mean, coefficient of variation and dead experts of one layer; without a token, all are dead."""
    mean = sum(tokens_per_expert) / len(tokens_per_expert)
    if mean == 0:
        return {"max_over_mean": 0.0, "cv": 0.0, "dead_experts": len(tokens_per_expert)}
    variance = sum((n - mean) ** 2 for n in tokens_per_expert) / len(tokens_per_expert)
    return {
        "max_over_mean": max(tokens_per_expert) / mean,
        "cv": math.sqrt(variance) / mean,
        "dead_experts": tokens_per_expert.count(0),
    }
