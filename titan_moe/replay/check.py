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
from torch import nn

from titan_moe.layer.dispatch.base import Routing
from titan_moe.layer.router import Query, Selection
from titan_moe.replay.ids import MISSING
from titan_moe.replay.regions import unseen_by_selective_ac
from titan_moe.replay.selectors import Microbatch, ReplaySelector
from titan_moe.replay.together import Together

NEAR_TIE = 1e-3  # of the router's scores: a flip at a smaller margin between K-th and next is rounding


class ReplayCheckError(RuntimeError):
    """A replay did not do what it should; raised on every rank at the same step."""


class Tally(NamedTuple):
    """Sums of one layer and step. What was filled, and padding, says nothing about replayed routes."""

    tokens: int = 0
    padding: int = 0
    filled: int = 0
    compared: int = 0  # tokens with installed ids that are no padding: what the next six are of
    picks: int = 0  # their installed ids
    exact: int = 0  # tokens all of whose installed ids the live top-k has too
    overlap: int = 0  # picks that the live top-k has too
    zero_overlap: int = 0
    near_tie_flips: int = 0
    suspicious_flips: int = 0
    at_the_door: int = 0  # installed ids, by forwards and recomputations that came to a dispatcher
    not_used: int = 0  # of them, those that are another id there
    miscounted: int = 0  # experts whose number of tokens is not that of the ids
    installed_hash: int = 0  # of ids, their places and their order, in forwards; wraps around
    used_hash: int = 0  # the same, as the dispatchers got them


class Gates(NamedTuple):
    """Limits of the *aligned* claim, over all layers of a step."""

    max_zero_overlap: float = 1e-2
    min_mean_overlap: float = 0.0


class ReplayCheck:
    """Watches the selectors (as an observer) and the doors of the dispatchers (by hooks)."""

    def __init__(
        self,
        model_parts: list[nn.Module],
        selectors: list[ReplaySelector],
        gates: Gates,
        folder: Path,
        together: Together,
    ) -> None:
        self.selectors = {selector.layer: selector for selector in selectors}
        self.gates, self.together, self.file = gates, together, folder / "replay_evidence.jsonl"
        self._file_is_ours = False
        self._sums: dict[str, torch.Tensor] = {}
        self._first_bad: dict[str, torch.Tensor] = {}
        self._calls: dict[str, Counter[str]] = {
            k: Counter() for k in ("fwd", "due", "bwd", "recomputed", "live")
        }
        for part in model_parts:
            for module in part.modules():
                layer: Any = module
                selector = getattr(getattr(layer, "router", None), "selector", None)
                if isinstance(selector, ReplaySelector) and selector.layer in self.selectors:
                    layer.routed_experts.register_forward_pre_hook(partial(self._at_the_door, selector))

    @torch.no_grad()
    def selected(
        self, selector: ReplaySelector, microbatch: Microbatch, selection: Selection, query: Query
    ) -> None:
        """The *aligned* claim of one forward."""
        origin = selection.origin
        if origin.installed_TK is None or selector.layer not in self.selectors:
            return
        live_TK, ranking_TE = query.live(), query.ranking()
        num_experts, top_k = ranking_TE.shape[1], live_TK.shape[1]
        present_TK = origin.installed_TK != MISSING
        there_T = present_TK.any(1) if origin.load_T is None else present_TK.any(1) & origin.load_T
        live_TE = torch.zeros_like(ranking_TE, dtype=torch.bool).scatter_(1, live_TK, True)
        shared_T = (live_TE.gather(1, selection.ids_TK) & present_TK).sum(1)
        picks_T = present_TK.sum(1)
        best = ranking_TE.topk(min(top_k + 1, num_experts), dim=1).values
        margin_T = best[:, top_k - 1] - best[:, -1] if num_experts > top_k else best[:, 0] * 0 + torch.inf
        flipped_T, none_T = there_T & (shared_T < picks_T), there_T & (shared_T == 0)
        self._add(
            selector.layer,
            tokens=torch.ones_like(picks_T).sum(),
            padding=picks_T.new_zeros(()) if origin.load_T is None else (~origin.load_T).sum(),
            filled=(~present_TK).sum(),
            compared=there_T.sum(),
            picks=(picks_T * there_T).sum(),
            exact=(there_T & (shared_T == picks_T)).sum(),
            overlap=(shared_T * there_T).sum(),
            zero_overlap=none_T.sum(),
            near_tie_flips=(flipped_T & (margin_T < NEAR_TIE)).sum(),
            suspicious_flips=(flipped_T & ~(margin_T < NEAR_TIE)).sum(),
            installed_hash=_hash(origin.installed_TK, present_TK),
        )
        self._remember_first(selector.layer, none_T, origin.tokens_T)

    @torch.no_grad()
    def _at_the_door(self, selector: ReplaySelector, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """The *used* claim, where the router has no say any more."""
        with unseen_by_selective_ac():
            self._used(selector, args[1])

    def _used(self, selector: ReplaySelector, routing: Routing) -> None:
        layer, origin = selector.layer, routing.origin
        if origin is None or origin.installed_TK is None:
            # Eval and other live forwards may; one of a microbatch with ids may not.
            self._calls["live"][layer] += int(selector.in_microbatch)
            return
        ids_TK, present_TK = routing.topk_expert_ids_TK, origin.installed_TK != MISSING
        ids_N, counts_E = ids_TK.flatten(), routing.num_tokens_per_expert_E
        own_E = torch.zeros_like(counts_E).scatter_add_(0, ids_N, torch.ones_like(ids_N))
        other_TK = (ids_TK != origin.installed_TK) & present_TK
        recomputes = selector.regions.recomputing
        used_hash = _hash(ids_TK, present_TK)
        self._add(
            layer,
            at_the_door=present_TK.sum(),
            not_used=other_TK.sum(),
            miscounted=(own_E != counts_E).sum(),
            used_hash=used_hash * 0 if recomputes else used_hash,
        )
        self._remember_first(layer, other_TK.any(1), origin.tokens_T)
        if recomputes:
            self._calls["recomputed"][layer] += 1
            return
        self._calls["fwd"][layer] += 1
        if routing.topk_scores_TK.requires_grad:
            self._calls["due"][layer] += 1
            routing.topk_scores_TK.register_hook(lambda grad: self._calls["bwd"].update([layer]))

    def _add(self, layer: str, **amounts: torch.Tensor) -> None:
        zero = next(iter(amounts.values())).new_zeros((), dtype=torch.int64)
        row = torch.stack([amounts.get(key, zero).to(torch.int64) for key in Tally._fields])
        self._sums[layer] = self._sums[layer] + row if layer in self._sums else row

    def _remember_first(self, layer: str, bad_T: torch.Tensor, tokens_T: torch.Tensor) -> None:
        """The lowest global token index among the bad ones."""
        none = torch.iinfo(torch.int64).max
        first = torch.cat([torch.where(bad_T, tokens_T, none), tokens_T.new_full((1,), none)]).min()
        known = self._first_bad.get(layer)
        self._first_bad[layer] = first if known is None else torch.minimum(known, first)

    def clear(self) -> None:
        """Forgets the step so far."""
        self._sums.clear()
        self._first_bad.clear()
        for counter in self._calls.values():
            counter.clear()

    def end_step(self, step: int, layers: list[str], num_microbatches: int) -> str:
        """Writes the evidence of a step and judges it; collective. The one host sync of the check.

        Args:
            layers: those that had ids installed.

        Returns:
            The summary for the console, over all ranks.

        Raises:
            ReplayCheckError: on all ranks, where any rank found something.
        """
        tallies, firsts = self._read(layers)
        calls = {layer: {kind: counter[layer] for kind, counter in self._calls.items()} for layer in layers}
        self.clear()
        problems = [
            problem
            for layer in layers
            for problem in _problems(layer, tallies[layer], calls[layer], num_microbatches, firsts[layer])
        ]
        ranks = self.together.gather((tallies, calls, problems, firsts))
        if self.together.rank == 0:
            self._write(step, ranks)
        found = [f"rank {rank}: {problems[0]}" for rank, (_, _, problems, _) in enumerate(ranks) if problems]
        whole = {layer: _sum([tallies[layer] for tallies, *_ in ranks]) for layer in layers}
        first = {layer: min(firsts[layer] for *_, firsts in ranks) for layer in layers}
        found += [text for layer in layers for text in self._gate(layer, whole[layer], first[layer])]
        total = _sum(list(whole.values()))
        if not total.compared:
            found.append("no token was checked on any rank")
        if found:
            raise ReplayCheckError(f"routing replay, step {step}: {found[0]} ({len(found)} findings)")
        done = {kind: sum(c[layer][kind] for _, c, *_ in ranks for layer in layers) for kind in self._calls}
        wanted = len(layers) * num_microbatches * len(ranks)
        parts = [total.exact / total.compared, total.zero_overlap / total.compared]
        return (
            f"replay fwd={done['fwd']}/{wanted} bwd={done['bwd']}/{done['due']} "
            f"missing={wanted - done['fwd']} filled={total.filled} mismatch={total.not_used} "
            f"exact={parts[0]:.2%} zero={parts[1]:.2%}"
        )

    def _read(self, layers: list[str]) -> tuple[dict[str, Tally], dict[str, int]]:
        """Sums and first bad tokens by layer, in one read of the device."""
        none = torch.iinfo(torch.int64).max
        known = [layer for layer in layers if layer in self._sums]
        rows = [torch.cat([self._sums[layer], self._first_bad[layer].view(1)]) for layer in known]
        read = dict(zip(known, torch.stack(rows).tolist() if rows else [], strict=True))
        tallies = {layer: Tally(*read[layer][:-1]) if layer in read else Tally() for layer in layers}
        return tallies, {layer: read[layer][-1] if layer in read else none for layer in layers}

    def _write(self, step: int, ranks: list[Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self._file_is_ours:
            _keep_steps_before(self.file, step)
            self._file_is_ours = True
        with self.file.open("a") as file:
            for rank, (tallies, calls, *_) in enumerate(ranks):
                for layer, tally in tallies.items():
                    line = _line(step, rank, self.selectors[layer].shape, tally, calls[layer])
                    file.write(json.dumps(line) + "\n")

    def _gate(self, layer: str, whole: Tally, first: int) -> list[str]:
        """Of one layer over all ranks: a wrong layer must not hide behind right ones."""
        if not whole.compared:
            return []
        zero, overlap = whole.zero_overlap / whole.compared, whole.overlap / max(1, whole.picks)
        found = []
        if zero > self.gates.max_zero_overlap:
            found.append(
                f"{layer}: {zero:.2%} of tokens share no expert with the live router, over "
                f"check_max_zero_overlap ({self.gates.max_zero_overlap:.2%}); the first is token {first}"
            )
        if overlap < self.gates.min_mean_overlap:
            found.append(
                f"{layer}: mean overlap {overlap:.2%} is under check_min_mean_overlap "
                f"({self.gates.min_mean_overlap:.2%})"
            )
        return found


def _line(step: int, rank: int, shape: Any, tally: Tally, calls: dict[str, int]) -> dict[str, Any]:
    def part(number: int, of: int) -> float | None:
        return number / of if of else None

    overlap, chance = part(tally.overlap, tally.picks), shape.top_k / shape.num_experts
    return {
        "step": step,
        "rank": rank,
        "layer": shape.name,
        **{kind: calls[kind] for kind in ("fwd", "bwd", "recomputed")},
        "tokens": tally.tokens,
        "padding": tally.padding,
        "filled": tally.filled,
        "used": None if not tally.at_the_door else 1 - tally.not_used / tally.at_the_door,
        "miscounted": tally.miscounted,
        "installed_ids": f"{tally.installed_hash % 2**64:016x}",
        "used_ids": f"{tally.used_hash % 2**64:016x}",
        "exact_set": part(tally.exact, tally.compared),
        "mean_overlap": overlap,
        "zero_overlap": part(tally.zero_overlap, tally.compared),
        "lift": None if overlap is None else (overlap - chance) / (1 - chance) if chance < 1 else 1.0,
        "near_tie_flips": tally.near_tie_flips,
        "suspicious_flips": tally.suspicious_flips,
    }


def _problems(
    layer: str, tally: Tally, calls: dict[str, int], num_microbatches: int, first: int
) -> list[str]:
    found = []
    if calls["fwd"] < num_microbatches:
        found.append(f"{layer}: replayed in {calls['fwd']} of {num_microbatches} microbatches (fwd)")
    if calls["bwd"] < calls["due"]:
        found.append(f"{layer}: replayed in {calls['bwd']} of {calls['due']} microbatches (bwd)")
    if calls["live"]:
        found.append(f"{layer}: {calls['live']} forwards or recomputations routed live")
    if 0 < calls["recomputed"] < calls["fwd"]:
        found.append(f"{layer}: {calls['recomputed']} of {calls['fwd']} forwards were recomputed")
    if tally.not_used or tally.installed_hash != tally.used_hash:
        found.append(
            f"{layer}: {tally.not_used} picks at the dispatcher are not the installed ones, the first of "
            f"token {first}"
        )
    if tally.miscounted:
        found.append(f"{layer}: the token counts of {tally.miscounted} experts are not those of the ids")
    return found


def _sum(tallies: list[Tally]) -> Tally:
    return Tally(*(sum(column) for column in zip(*tallies, strict=True)))


def _keep_steps_before(file: Path, step: int) -> None:
    """A resumed run continues its own record."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    file.write_text("".join(kept))


def _hash(ids_TK: torch.Tensor, present_TK: torch.Tensor) -> torch.Tensor:
    places_N = torch.arange(1, ids_TK.numel() + 1, device=ids_TK.device)
    weights_N = places_N * 6364136223846793005 + 1442695040888963407  # Knuth's MMIX generator
    return ((ids_TK.flatten().long() + 2) * weights_N * present_TK.flatten()).sum()
