"""One step of two captured runs, module by module and token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from titan_moe.numerics.features import distance
from titan_moe.numerics.load import Step
from titan_moe.numerics.sublayers import is_sublayer
from titan_moe.numerics.tolerance import Tolerance

ROUNDING = 1e-6  # of router scores, relative: what fp32 sums in another order may move them by
USUAL = 16  # a margin of as many usual changes of scores can still be one of them


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """One module at one step.

    Attributes:
        relative: root mean square of the tokens' differences over that of their norms, without tokens whose
            routes flipped explicably before this module: with other experts, other numbers.
        absolute: the same, not divided.
        worst: the largest difference of one of these tokens, over the same.
        differing: tokens whose bits differ.
        first_token: the first of them, -1 without.
        worst_token: the one that is farthest off.
        missing: tokens that only one run has; ``first_token`` is one of them then.
        replicas: of a run, tokens that its ranks do not agree on.
        beyond: tokens beyond tolerance, in words.
    """

    step: int
    module: str
    relative: float
    absolute: float
    worst: float
    tokens: int
    differing: int
    first_token: int
    worst_token: int
    missing: int
    replicas: int
    beyond: str


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Tokens of a layer and step whose set of experts differs.

    Attributes:
        moved: the median of how far a token's scores are apart, over their norm.
        near: flips at a margin that such a change of scores explains.
        following: of the others, those in a sequence that had a flip in an earlier layer, at or after it.
        suspicious: what is left.
        replicas: tokens that a run's ranks do not route alike.
        explained: the tokens of ``near`` and ``following``.
    """

    step: int
    layer: str
    moved: float
    tokens: int
    flipped: int
    near: int
    following: int
    suspicious: int
    first_token: int
    first_suspicious: int
    replicas: int
    explained: list[int]


class StepDifference:
    """Walks through one step of two runs in the order of the forward, then of the backward."""

    def __init__(
        self, step: int, order: list[str], left: Step, right: Step, tolerance: Tolerance, *, seq_len: int
    ) -> None:
        self.step, self.tolerance, self.seq_len = step, tolerance, seq_len
        self.modules: list[ModuleDifference] = []
        self.flips: list[Flips] = []
        self.explained = torch.zeros(0, dtype=torch.int64)  # so far in this walk
        self.flipped = torch.zeros(0, dtype=torch.int64)
        for key in [key for key in order if key in left and key in right]:
            if key.endswith("|route"):
                self._routes(key.removesuffix("|route"), left[key], right[key])
            else:
                name = key.replace("|out", "").replace("|grad", " (gradient)")
                self.modules.append(self._module(name, left[key], right[key]))

    def _routes(self, layer: str, left: Any, right: Any) -> None:
        both, _ = _side_by_side(left, right)
        tokens = both["tokens"][0]
        moved_T = _where_different(distance(*both["score"]), *both["score"])
        size = _root_mean_square(both["score_norm"][0]).clamp_min(1e-30)
        usual = float(moved_T.median() / size) if len(tokens) else 0.0
        explicable = size * max(ROUNDING, USUAL * min(usual, self.tolerance.module))
        flipped = (both["ids"][0] != both["ids"][1]).any(1)
        near = flipped & (torch.minimum(*both["margin"]) <= explicable)
        following = flipped & ~near & self._after_a_flip(tokens)
        suspicious = flipped & ~near & ~following
        self.explained = torch.cat([self.explained, tokens[near | following]])
        self.flipped = torch.cat([self.flipped, tokens[flipped]])
        self.flips.append(
            Flips(
                step=self.step,
                layer=layer,
                moved=usual,
                tokens=len(tokens),
                flipped=int(flipped.sum()),
                near=int(near.sum()),
                following=int(following.sum()),
                suspicious=int(suspicious.sum()),
                first_token=_first(tokens, flipped),
                first_suspicious=_first(tokens, suspicious),
                replicas=_count_replicas(left, right),
                explained=tokens[near | following].tolist(),
            )
        )

    def _after_a_flip(self, tokens: torch.Tensor) -> torch.Tensor:
        """Attention has carried a flip of an earlier layer to them."""
        if not len(self.flipped) or not len(tokens):
            return torch.zeros_like(tokens, dtype=torch.bool)
        sequences = int(max(tokens.max(), self.flipped.max())) // self.seq_len + 1
        never = torch.full((sequences,), torch.iinfo(torch.int64).max)
        first = never.scatter_reduce(0, self.flipped // self.seq_len, self.flipped, "amin")
        return tokens >= first[tokens // self.seq_len]

    def _module(self, name: str, left: Any, right: Any) -> ModuleDifference:
        both, alone = _side_by_side(left, right)
        tokens = both["tokens"][0]
        differs = both["bits_T"][0] != both["bits_T"][1]
        off = torch.where(differs, _where_different(distance(*both["projection_TQ"])), 0.0)
        counted = ~torch.isin(tokens, self.explained)
        if 2 * counted.sum() < len(tokens):  # most flip: what they differ by is then no exception
            counted = torch.ones_like(counted)
        norm_T = both["norm_T"][0]
        scale = _root_mean_square(norm_T[norm_T.isfinite()]).clamp_min(1e-30)
        size = _root_mean_square(off[counted])
        wrong = torch.cat([tokens[counted & ~(off <= self.tolerance.module * scale)], alone]).sort().values
        return ModuleDifference(
            step=self.step,
            module=name,
            relative=float(size / scale),
            absolute=float(size),
            worst=float(off[counted].max() / scale) if counted.any() else 0.0,
            tokens=len(tokens),
            differing=int(differs.sum()),
            first_token=int(alone[0]) if len(alone) else _first(tokens, differs),
            worst_token=int(tokens[off.argmax()]) if differs.any() else -1,
            missing=len(alone),
            replicas=_count_replicas(left, right),
            beyond=places(wrong, self.seq_len),
        )


def only_sublayers(modules: list[ModuleDifference]) -> list[ModuleDifference]:
    """Outputs of what blocks add to their residual stream."""
    return [m for m in modules if is_sublayer(m.module)]


def places(tokens: torch.Tensor, seq_len: int) -> str:
    """Ascending global token indices as sequences and positions; the first three runs of them."""
    if not len(tokens):
        return "no token"
    shown = []
    runs = list(_runs(tokens, seq_len))
    for run in runs[:3]:
        sequence, first, last = int(run[0]) // seq_len, int(run[0]) % seq_len, int(run[-1]) % seq_len
        shown.append(f"sequence {sequence} position{f's {first}-{last}' if last > first else f' {first}'}")
    more = f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)}: {', '.join(shown)}{more}"


def _runs(tokens: torch.Tensor, seq_len: int) -> Iterator[torch.Tensor]:
    ends = torch.nonzero((tokens[1:] != tokens[:-1] + 1) | (tokens[1:] % seq_len == 0)).flatten() + 1
    yield from torch.tensor_split(tokens, ends)


def _side_by_side(left: Any, right: Any) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Columns of the tokens that both have, and the tokens that only one has."""
    mine, theirs = left["tokens"], right["tokens"]
    in_left, in_right = torch.isin(mine, theirs), torch.isin(theirs, mine)
    alone = torch.cat([mine[~in_left], theirs[~in_right]]).sort().values
    columns = [name for name in left if name != "replicas_differ"]
    return {name: (left[name][in_left], right[name][in_right]) for name in columns}, alone


def _where_different(off_T: torch.Tensor, *pair_TQ: torch.Tensor) -> torch.Tensor:
    """What is not a number is infinitely far off, unless both are the same."""
    if pair_TQ:
        same = (pair_TQ[0] == pair_TQ[1]) | (pair_TQ[0].isnan() & pair_TQ[1].isnan())
        off_T = torch.where(same.all(1), 0.0, off_T)
    return torch.where(off_T.isfinite(), off_T, torch.inf)


def _count_replicas(left: Any, right: Any) -> int:
    return max(int(run["replicas_differ"].sum()) for run in (left, right))


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt() if len(x) else torch.zeros((), dtype=torch.float64)


def _first(tokens: torch.Tensor, where: torch.Tensor) -> int:
    return int(tokens[where][0]) if where.any() else -1
