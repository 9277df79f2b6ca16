"""Evidence that a replay happened: which ids reached the dispatchers, and what the live routers would do.

Two claims, apart. *Used*: the ids at a dispatcher's door are those that were installed, in forwards and in
recomputations, and the backward came by. *Aligned*: how far the live top-k agrees with them.
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from titan_moe.replay.ids import MISSING
from titan_moe.replay.slots import Microbatch, Slot
from titan_moe.router import Choice, Query

NEAR_TIE = 1e-3  # of the router's scores: a flip at a smaller margin between K-th and next is rounding


class ReplayCheckError(RuntimeError):
    """A replay did not do what it should; raised on every rank at the same step."""


class Tally(NamedTuple):
    """Sums of one layer and step on one rank; padding counts in ``tokens`` and ``padding`` only."""

    tokens: int = 0
    padding: int = 0
    filled: int = 0
    not_used: int = 0  # picks at a dispatcher that are not the installed ones, recomputations included
    miscounted: int = 0  # experts whose number of tokens is not that of the ids
    exact: int = 0  # tokens whose live set is the replayed one
    overlap: int = 0  # picks that the live top-k has too
    zero_overlap: int = 0
    near_tie_flips: int = 0
    suspicious_flips: int = 0
    ids_hash: int = 0  # order and place of every installed id; wraps around


class Gates(NamedTuple):
    """Limits of the *aligned* claim, over all layers of a step."""

    max_zero_overlap: float = 1e-2
    min_mean_overlap: float = 0.0


class ReplayCheck:
    """Watches the slots (as an observer) and the doors of the dispatchers (by hooks)."""

    def __init__(self, model_parts: list[nn.Module], slots: list[Slot], gates: Gates, folder: Path) -> None:
        self.slots = {slot.layer: slot for slot in slots}
        self.gates, self.rank = gates, dist.get_rank() if dist.is_initialized() else 0
        self.file = folder / "replay_evidence.jsonl"
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.file.write_text("")
        self._sums: dict[str, torch.Tensor] = {}
        self._calls: dict[str, Counter[str]] = {kind: Counter() for kind in ("fwd", "bwd", "recomputed")}
        for part in model_parts:
            for module in part.modules():
                layer: Any = module
                slot = getattr(getattr(layer, "router", None), "source", None)
                if isinstance(slot, Slot) and slot.layer in self.slots:
                    layer.routed_experts.register_forward_pre_hook(partial(self._at_the_door, slot))

    @torch.no_grad()
    def chosen(self, slot: Slot, microbatch: Microbatch, choice: Choice, query: Query) -> None:
        """The *aligned* claim of one forward."""
        origin = choice.origin
        if origin.installed_TK is None or slot.layer not in self.slots:
            return
        live_TK, ranking_TE = query.live(), query.ranking()
        num_experts, top_k = ranking_TE.shape[1], live_TK.shape[1]
        valid_T = torch.ones_like(live_TK[:, 0], dtype=torch.bool) if origin.load_T is None else origin.load_T
        replayed_TE = torch.zeros_like(ranking_TE, dtype=torch.bool).scatter_(1, choice.ids_TK, True)
        overlap_T = replayed_TE.gather(1, live_TK).sum(1)
        best = ranking_TE.topk(min(top_k + 1, num_experts), dim=1).values
        margin_T = best[:, top_k - 1] - best[:, -1] if num_experts > top_k else best[:, 0] * 0 + torch.inf
        flipped_T = valid_T & (overlap_T < top_k)
        filled_TK = origin.filled_TK if origin.filled_TK is not None else torch.zeros_like(replayed_TE[:, :1])
        self._add(
            slot.layer,
            tokens=valid_T.numel(),
            padding=(~valid_T).sum(),
            filled=(filled_TK & valid_T.unsqueeze(1)).sum(),
            exact=(valid_T & (overlap_T == top_k)).sum(),
            overlap=(overlap_T * valid_T).sum(),
            zero_overlap=(valid_T & (overlap_T == 0)).sum(),
            near_tie_flips=(flipped_T & (margin_T < NEAR_TIE)).sum(),
            suspicious_flips=(flipped_T & ~(margin_T < NEAR_TIE)).sum(),
            ids_hash=_hash(origin.installed_TK),
        )

    @torch.no_grad()
    def _at_the_door(self, slot: Slot, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """The *used* claim, where the router has no say any more."""
        routing = args[1]
        origin = routing.origin
        if origin is None or origin.installed_TK is None:
            return
        layer = slot.layer
        ids_TK, installed_TK = routing.topk_expert_ids_TK, origin.installed_TK
        counts_E = routing.num_tokens_per_expert_E
        ids_N = ids_TK.flatten()
        own_E = torch.zeros_like(counts_E).scatter_add_(0, ids_N, torch.ones_like(ids_N))
        self._add(
            layer,
            not_used=((ids_TK != installed_TK) & (installed_TK != MISSING)).sum(),
            miscounted=(own_E != counts_E).sum(),
        )
        if slot.regions.recomputing:
            self._calls["recomputed"][layer] += 1
            return
        self._calls["fwd"][layer] += 1
        if routing.topk_scores_TK.requires_grad:
            routing.topk_scores_TK.register_hook(lambda grad: self._calls["bwd"].update([layer]))

    def _add(self, layer: str, **amounts: torch.Tensor | int) -> None:
        device = next(a.device for a in amounts.values() if isinstance(a, torch.Tensor))
        row = torch.stack([torch.as_tensor(amounts.get(key, 0), device=device) for key in Tally._fields])
        self._sums[layer] = self._sums[layer] + row if layer in self._sums else row

    def end_step(self, step: int, layers: list[str], num_microbatches: int) -> str:
        """Writes the evidence of a step and judges it; collective. The one host sync of the check.

        Args:
            layers: those that had ids installed.

        Returns:
            The summary for the console, over all ranks.

        Raises:
            ReplayCheckError: on all ranks, where any rank found something.
        """
        lines, problems, total = [], [], Tally()
        for layer in layers:
            calls = {kind: counter[layer] for kind, counter in self._calls.items()}
            tally = Tally(*self._sums[layer].tolist()) if layer in self._sums else Tally()
            lines.append(_line(step, self.rank, self.slots[layer].shape, tally, calls))
            problems += _problems(layer, tally, calls, num_microbatches)
            total = _sum([total, tally])
        done = {kind: sum(counter[layer] for layer in layers) for kind, counter in self._calls.items()}
        self._sums.clear()
        for counter in self._calls.values():
            counter.clear()
        ranks = _from_all_ranks((lines, problems, total))
        if self.rank == 0:
            with self.file.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for lines, _, _ in ranks for line in lines)
        total = _sum([rank_total for _, _, rank_total in ranks])
        top_k = next((slot.shape.top_k for slot in self.slots.values()), 1)
        found = [f"rank {rank}: {problems[0]}" for rank, (_, problems, _) in enumerate(ranks) if problems]
        found += self._gate(total, top_k)
        if found:
            raise ReplayCheckError(f"routing replay, step {step}: {found[0]} ({len(found)} findings)")
        wanted, valid = len(layers) * num_microbatches, max(1, total.tokens - total.padding)
        return (
            f"replay fwd={done['fwd']}/{wanted} bwd={done['bwd']}/{wanted} missing={wanted - done['fwd']} "
            f"filled={total.filled} mismatch={total.not_used} "
            f"exact={total.exact / valid:.2%} zero={total.zero_overlap / valid:.2%}"
        )

    def _gate(self, whole: Tally, top_k: int) -> list[str]:
        valid = whole.tokens - whole.padding
        if not valid:
            return ["no token was checked on any rank"]
        zero, overlap = whole.zero_overlap / valid, whole.overlap / valid / top_k
        found = []
        if zero > self.gates.max_zero_overlap:
            found.append(
                f"{zero:.2%} of tokens share no expert with the live routers, over check_max_zero_overlap"
            )
        if overlap < self.gates.min_mean_overlap:
            limit = f"check_min_mean_overlap ({self.gates.min_mean_overlap:.2%})"
            found.append(f"mean overlap {overlap:.2%} is under {limit}")
        return found


def _line(step: int, rank: int, shape: Any, tally: Tally, calls: dict[str, int]) -> dict[str, Any]:
    valid = max(1, tally.tokens - tally.padding)
    overlap, chance = tally.overlap / valid / shape.top_k, shape.top_k / shape.num_experts
    picks = max(1, tally.tokens * shape.top_k)
    return {
        "step": step,
        "rank": rank,
        "layer": shape.name,
        **calls,
        "tokens": tally.tokens,
        "padding": tally.padding,
        "filled": tally.filled,
        "used": 1 - tally.not_used / picks,
        "miscounted": tally.miscounted,
        "ids": f"{tally.ids_hash % 2**64:016x}",
        "exact_set": tally.exact / valid,
        "mean_overlap": overlap,
        "zero_overlap": tally.zero_overlap / valid,
        "lift": (overlap - chance) / (1 - chance) if chance < 1 else 1.0,
        "near_tie_flips": tally.near_tie_flips,
        "suspicious_flips": tally.suspicious_flips,
    }


def _problems(layer: str, tally: Tally, calls: dict[str, int], num_microbatches: int) -> list[str]:
    found = []
    for kind in ("fwd", "bwd"):
        if calls[kind] < num_microbatches:
            found.append(f"{layer}: replayed in {calls[kind]} of {num_microbatches} microbatches ({kind})")
    if 0 < calls["recomputed"] < calls["fwd"]:
        found.append(
            f"{layer}: only {calls['recomputed']} of {calls['fwd']} forwards were recomputed with it"
        )
    if tally.not_used:
        found.append(f"{layer}: {tally.not_used} picks at the dispatcher are not the installed ones")
    if tally.miscounted:
        found.append(f"{layer}: the token counts of {tally.miscounted} experts are not those of the ids")
    return found


def _sum(tallies: list[Tally]) -> Tally:
    return Tally(*(sum(column) for column in zip(*tallies, strict=True)))


def raise_together(error: Exception | None) -> None:
    """Raises a rank's error on every rank, or on none; collective. No rank waits for one that has left."""
    found = [(rank, other) for rank, other in enumerate(_from_all_ranks(error)) if other is not None]
    if error is not None:
        raise error
    if found:
        rank, other = found[0]
        raise type(other)(f"rank {rank}: {other}")


def _from_all_ranks(mine: Any) -> list[Any]:
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _hash(ids_TK: torch.Tensor) -> torch.Tensor:
    places = torch.arange(1, ids_TK.numel() + 1, device=ids_TK.device)
    return ((ids_TK.flatten() + 2) * (places * 6364136223846793005 + 1442695040888963407)).sum()
