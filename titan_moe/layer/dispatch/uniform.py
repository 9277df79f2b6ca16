"""What uniform routing costs, in closed form. The legend is in ``titan_moe/layer/moe.py``."""

from math import comb

from titan_moe.layer.dispatch.ownership import Ownership


def ranks_per_token(
    num_experts: int,
    top_k: int,
    ep_size: int,
    *,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
) -> float:
    """How many of S EP ranks own at least one of a token's K experts, on average.

    All choices of K experts alike: ``S * (1 - C(E - E/S, K) / C(E, K))``. With groups, all choices of
    ``num_limited_groups`` out of ``num_expert_groups`` groups alike, then all choices of K in them.
    """
    groups = num_expert_groups or 1
    used = (num_limited_groups or groups) if num_expert_groups else 1
    size, owners = num_experts // groups, Ownership(num_experts, ep_size)
    reached = 0.0
    for rank in range(ep_size):
        own = owners.experts_of(rank)
        owned = [_overlap(own, range(group * size, (group + 1) * size)) for group in range(groups)]
        reached += sum(
            ways * (1 - comb(used * size - on_rank, top_k) / comb(used * size, top_k))
            for on_rank, ways in _choices(owned, used).items()
        ) / comb(groups, used)
    return reached


def _overlap(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))


def _choices(owned: list[int], used: int) -> dict[int, int]:
    """In how many ways ``used`` of the groups hold how many of the rank's experts."""
    ways = {(0, 0): 1}  # (groups chosen, experts of this rank in them)
    for experts in owned:
        more = dict(ways)
        for (chosen, held), count in ways.items():
            key = (chosen + 1, held + experts)
            more[key] = more.get(key, 0) + count
        ways = more
    return {held: count for (chosen, held), count in ways.items() if chosen == used}
