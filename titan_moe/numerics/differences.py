"""One step of two captured runs, module by module and token by token."""

from dataclasses import dataclass
from typing import Any

import torch

from titan_moe.numerics.sublayers import is_sublayer
from titan_moe.numerics.tolerance import Tolerance

Step = dict[str, dict[str, torch.Tensor]]  # what Captured.step returns


@dataclass(frozen=True, kw_only=True)
class ModuleDifference:
    """One module at one step.

    Attributes:
        relative: root mean square of the tokens' differences over that of their norms, without tokens whose
            routes flip explicably in this step: with other experts, other numbers.
        absolute: the same, not divided.
        differing: tokens whose bits differ.
        first_token: the first of them, -1 without.
        worst_token: the one that is farthest off.
        missing: tokens that only one run has; ``first_token`` is one of them then.
        beyond: tokens beyond tolerance, in words.
    """

    step: int
    module: str
    relative: float
    absolute: float
    tokens: int
    differing: int
    first_token: int
    worst_token: int
    missing: int
    beyond: str


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Tokens of a layer and step whose set of experts differs.

    Attributes:
        near: of them, at a margin that the layer's usual difference of scores explains.
        following: of the others, tokens that an earlier layer of the step sent elsewhere already.
        suspicious: what is left.
        explained: the tokens of the first two kinds.
    """

    step: int
    layer: str
    tokens: int
    flipped: int
    near: int
    following: int
    suspicious: int
    first_token: int
    first_suspicious: int
    explained: list[int]


def compare_routes(step: int, order: list[str], left: Step, right: Step, tolerance: Tolerance) -> list[Flips]:
    """Layers in ``order``."""
    found, flipped_before = [], torch.zeros(0, dtype=torch.int64)
    for key in [key for key in order if key.endswith("|route") and key in left and key in right]:
        both, _ = _side_by_side(left[key], right[key])
        tokens = both["tokens"][0]
        flipped = (both["ids"][0] != both["ids"][1]).any(1)
        usual = (both["score"][0] - both["score"][1]).abs().median() if len(tokens) else 0.0
        near = flipped & (torch.minimum(*both["margin"]) <= max(tolerance.near_tie, 16 * float(usual)))
        following = flipped & ~near & torch.isin(tokens, flipped_before)
        suspicious = flipped & ~near & ~following
        flipped_before = torch.cat([flipped_before, tokens[flipped]])
        found.append(
            Flips(
                step=step,
                layer=key.removesuffix("|route"),
                tokens=len(tokens),
                flipped=int(flipped.sum()),
                near=int(near.sum()),
                following=int(following.sum()),
                suspicious=int(suspicious.sum()),
                first_token=_first(tokens, flipped),
                first_suspicious=_first(tokens, suspicious),
                explained=tokens[near | following].tolist(),
            )
        )
    return found


def compare_modules(
    step: int,
    order: list[str],
    left: Step,
    right: Step,
    tolerance: Tolerance,
    *,
    seq_len: int,
    flips: list[Flips],
) -> list[ModuleDifference]:
    """In ``order``, which is that of the first forward, then that of the backward; ``flips`` of this step."""
    explained = torch.tensor(sorted({token for f in flips for token in f.explained}), dtype=torch.int64)
    found = []
    for key in order:
        if not key.endswith("|route") and key in left and key in right:
            name = key.replace("|out", "").replace("|grad", " (gradient)")
            found.append(_module(step, name, left[key], right[key], explained, tolerance, seq_len))
    return found


def only_sublayers(modules: list[ModuleDifference]) -> list[ModuleDifference]:
    """Outputs of what blocks add to their residual stream."""
    return [m for m in modules if is_sublayer(m.module)]


def places(tokens: torch.Tensor, seq_len: int) -> str:
    """Ascending global token indices as sequences and positions; the first three runs of them."""
    if not len(tokens):
        return "no token"
    ends = torch.nonzero((tokens[1:] != tokens[:-1] + 1) | (tokens[1:] % seq_len == 0)).flatten() + 1
    runs = torch.tensor_split(tokens, ends)
    shown = []
    for run in runs[:3]:
        sequence, first, last = int(run[0]) // seq_len, int(run[0]) % seq_len, int(run[-1]) % seq_len
        shown.append(f"sequence {sequence} position{f's {first}-{last}' if last > first else f' {first}'}")
    more = f" and {len(runs) - 3} more runs" if len(runs) > 3 else ""
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)}: {', '.join(shown)}{more}"


def _module(
    step: int,
    name: str,
    left: Any,
    right: Any,
    explained: torch.Tensor,
    tolerance: Tolerance,
    seq_len: int,
) -> ModuleDifference:
    both, alone = _side_by_side(left, right)
    tokens = both["tokens"][0]
    differs = both["bits_T"][0] != both["bits_T"][1]
    off = (both["projection_T"][0] - both["projection_T"][1]).abs()
    off = torch.where(differs & ~off.isfinite(), torch.inf, off)
    counted = ~torch.isin(tokens, explained)
    if 2 * counted.sum() < len(tokens):  # most flip: what they differ by is then no exception
        counted = torch.ones_like(counted)
    scale = _root_mean_square(both["norm_T"][0]).clamp_min(1e-30)
    size = _root_mean_square(off[counted])
    wrong = torch.cat([tokens[counted & ~(off <= tolerance.module * scale)], alone]).sort().values
    return ModuleDifference(
        step=step,
        module=name,
        relative=float(size / scale),
        absolute=float(size),
        tokens=len(tokens),
        differing=int(differs.sum()),
        first_token=int(alone[0]) if len(alone) else _first(tokens, differs),
        worst_token=int(tokens[off.argmax()]) if differs.any() else -1,
        missing=len(alone),
        beyond=places(wrong, seq_len),
    )


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt() if len(x) else torch.zeros((), dtype=torch.float64)


def _side_by_side(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """Columns of the tokens that both have, and the tokens that only one has."""
    mine, theirs = left["tokens"], right["tokens"]
    in_left, in_right = torch.isin(mine, theirs), torch.isin(theirs, mine)
    alone = torch.cat([mine[~in_left], theirs[~in_right]]).sort().values
    return {name: (left[name][in_left], right[name][in_right]) for name in left}, alone


def _first(tokens: torch.Tensor, where: torch.Tensor) -> int:
    return int(tokens[where][0]) if where.any() else -1
