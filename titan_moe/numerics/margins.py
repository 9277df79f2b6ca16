"""The margin by which a token's experts were chosen."""

from typing import Any, NamedTuple, Self

import torch


class Groups(NamedTuple):
    """Group-limited routing: the experts' groups, and how many of them a token may use."""

    number: int
    limited: int

    @classmethod
    def of(cls, router: Any) -> Self | None:
        """Of a router, or its config, with torchtitan's names; None where there is no such limit."""
        number = router.num_expert_groups
        return None if number is None else cls(number, router.num_limited_groups)


def margins(biased_TE: torch.Tensor, top_k: int, groups: Groups | None) -> torch.Tensor:
    """Returns ``(T,)`` in fp64: the choice stays as it is while no score changes by more than the margin.

    It is infinite where there is no choice. With groups, the gap between two groups counts by half: a group's
    score is a sum of two scores, and both may move.
    """
    ranking_TE = biased_TE.double()
    margin_T = ranking_TE.new_full((ranking_TE.shape[0],), torch.inf)
    if groups is not None:
        grouped_TGe = ranking_TE.unflatten(1, (groups.number, -1))
        sums_TG = grouped_TGe.topk(2, dim=2).values.sum(2)
        margin_T = _gap(sums_TG, groups.limited) / 2
        kept = sums_TG >= sums_TG.topk(groups.limited, dim=1).values[:, -1:]
        ranking_TE = grouped_TGe.masked_fill(~kept.unsqueeze(2), -torch.inf).flatten(1)
    return torch.minimum(margin_T, _gap(ranking_TE, top_k))


def _gap(x: torch.Tensor, k: int) -> torch.Tensor:
    if x.shape[1] <= k:
        return x.new_full((x.shape[0],), torch.inf)
    best = x.topk(k + 1, dim=1).values
    return best[:, k - 1] - best[:, k]
