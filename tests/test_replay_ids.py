"""Replayed expert ids: what ingest lets in, how missing ones are filled, what the router makes of them."""

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torchtitan.models.common.linear import Linear

from tests import oracle
from titan_moe.layer.dispatch.base import Routing
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.router import Query, Selection, TokenChoiceTopKRouter
from titan_moe.replay.ids import (
    MISSING,
    LayerShape,
    ReplayDataError,
    balanced_ranking,
    fill_missing,
    ingest,
    narrowest_dtype,
)
from titan_moe.replay.regions import Regions
from titan_moe.replay.selectors import Installed, Microbatch, ReplaySelector, ReplaySession

INF, NAN = math.inf, math.nan
Fill = Callable[[Tensor, Tensor], Tensor]  # (ids_TK, ranking_TE) -> ids_TK without MISSING


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def distinct_ids(*shape: int, num_experts: int, top_k: int, seed: int = 0) -> Tensor:
    """``(*shape, K)`` int64: K different ids per row, in no order."""
    return draw(*shape, num_experts, seed=seed).argsort(-1)[..., :top_k]


# --- fill_missing: every row is full, nothing that was there moves, and the best free experts are taken


def with_nan(ranking_TE: Tensor) -> Tensor:
    """NaN here and there, and a whole row of it."""
    ranking_TE[:, ::3] = NAN
    ranking_TE[1] = NAN
    return ranking_TE


def with_groups(ranking_TE: Tensor) -> Tensor:
    """As a group-limited router ranks: all but one or two blocks of experts are -inf; one row is all -inf."""
    num_experts = ranking_TE.shape[1]
    for t in range(ranking_TE.shape[0]):
        first = t * 5 % num_experts
        outside = [e for e in range(num_experts) if not first <= e < first + max(num_experts // 4, 1)]
        ranking_TE[t, outside] = -INF
    ranking_TE[2] = -INF
    return ranking_TE


def with_infinities(ranking_TE: Tensor) -> Tensor:
    """Both signs and NaN in a row, +inf ones that tie, and a row of +inf."""
    ranking_TE[:, ::2] = INF
    ranking_TE[:, ::5] = -INF
    ranking_TE[:, 1::7] = NAN
    ranking_TE[3] = INF
    return ranking_TE


RANKINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda ranking_TE: ranking_TE,
    "ties": lambda ranking_TE: ranking_TE.round(),
    "signed_zeros": lambda ranking_TE: torch.copysign(torch.zeros_like(ranking_TE), ranking_TE),
    "constant": torch.ones_like,
    "groups": with_groups,
    "nan": with_nan,
    "infinities": with_infinities,
    "extremes": lambda ranking_TE: ranking_TE.sign() * torch.finfo(ranking_TE.dtype).max,
}
MASKS: dict[str, Callable[[int, int, random.Random], bool]] = {  # (k, K, chance) -> is pick k missing
    "all": lambda k, K, chance: True,
    "none": lambda k, K, chance: False,
    "trailing": lambda k, K, chance: k >= K // 2,
    "leading": lambda k, K, chance: k <= K // 2,
    "middle": lambda k, K, chance: 0 < k < K - 1,
    "random": lambda k, K, chance: chance.random() < 0.4,
}
SHAPES = [(1, 1), (2, 1), (2, 2), (5, 5), (16, 1), (16, 8), (16, 16), (64, 6), (130, 9)]  # E, K
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cases(kind: str) -> list[tuple[Tensor, Tensor]]:
    """(ids_TK, ranking_TE) for one kind of ranking, over shapes, masks and dtypes."""
    found = []
    for seed, (num_experts, top_k) in enumerate(SHAPES):
        for number, mask in enumerate(MASKS.values()):
            chance = random.Random(f"{seed} {number}")
            ids_TK = distinct_ids(7, num_experts=num_experts, top_k=top_k, seed=seed)
            missing = [[mask(k, top_k, chance) for k in range(top_k)] for _ in range(7)]
            ids_TK[torch.tensor(missing)] = MISSING
            dtype = DTYPES[(seed + number) % len(DTYPES)]
            found.append((ids_TK, RANKINGS[kind](draw(7, num_experts, seed=seed + 100, dtype=dtype))))
    return found


def filled_slowly(row: Sequence[int], ranking: Sequence[float]) -> list[int]:
    """The row with its gaps closed, from left to right, by the best of what is left."""
    filled = list(row)
    for k, expert in enumerate(row):
        if expert != MISSING:
            continue
        best = None
        for e, value in enumerate(ranking):
            if e in filled:
                continue
            value = -INF if math.isnan(value) else value
            if best is None or value > best[0]:
                best = (value, e)
        assert best is not None
        filled[k] = best[1]
    return filled


def assert_total(ids_TK: Tensor, filled_TK: Tensor, num_experts: int) -> None:
    """K different ids in range per row, no dispatch gap, and present picks where they were."""
    for before, after in zip(ids_TK.tolist(), filled_TK.tolist(), strict=True):
        assert len(set(after)) == len(before), f"{before} -> {after}"
        assert all(0 <= e < num_experts for e in after), f"{before} -> {after}"
        assert all(b in (MISSING, a) for b, a in zip(before, after, strict=True)), f"{before} -> {after}"
    routing_map_TE = torch.zeros(ids_TK.shape[0], num_experts, dtype=torch.bool)
    routing_map_TE.scatter_(1, filled_TK, True)
    assert ids_TK.numel() - int(routing_map_TE.sum()) == 0


def assert_filled(ids_TK: Tensor, ranking_TE: Tensor, filled_TK: Tensor) -> None:
    """``assert_total``, and the filled ones are the oracle's."""
    assert_total(ids_TK, filled_TK, ranking_TE.shape[1])
    rows = zip(ids_TK.tolist(), ranking_TE.tolist(), strict=True)
    assert filled_TK.tolist() == [filled_slowly(row, ranking) for row, ranking in rows]


def broken(kind: str, fill: Fill, check: Callable[..., None]) -> int:
    """How many of the cases a way to fill gets wrong."""
    failures = 0
    for ids_TK, ranking_TE in cases(kind):
        filled_TK = fill(ids_TK.clone(), ranking_TE)
        try:
            if check is assert_total:
                assert_total(ids_TK, filled_TK, ranking_TE.shape[1])
            else:
                check(ids_TK, ranking_TE, filled_TK)
        except (AssertionError, RuntimeError):  # the latter from scatter: an id out of range
            failures += 1
    return failures


def cyclic_fill(ids_TK: Tensor, ranking_TE: Tensor) -> Tensor:
    """What LLM360/miles#11 replaced: gaps get 0, 1, 2, ... over the whole batch, rows notwithstanding."""
    missing_TK = ids_TK == MISSING
    return ids_TK.masked_scatter(missing_TK, torch.arange(ids_TK.numel()) % ranking_TE.shape[1])


def one_hot_fill(ids_TK: Tensor, ranking_TE: Tensor) -> Tensor:
    """LLM360/miles#11: a (T, K, E) one-hot says who is taken, and -inf sinks them, next to other -inf."""
    missing_TK = ids_TK == MISSING
    taken_TKE = F.one_hot(ids_TK.clamp(min=0), ranking_TE.shape[1]) * ~missing_TK.unsqueeze(-1)
    sunk_TE = ranking_TE.masked_fill(taken_TKE.sum(1).bool(), -INF)
    order_TE = sunk_TE.sort(dim=1, descending=True, stable=True).indices
    return torch.where(missing_TK, order_TE.gather(1, (missing_TK.cumsum(1) - 1).clamp(min=0)), ids_TK)


class TestFill:
    @pytest.mark.parametrize("kind", RANKINGS)
    def test_every_row_is_total_and_takes_the_best_free(self, kind: str) -> None:
        for ids_TK, ranking_TE in cases(kind):
            before, ranking_before = ids_TK.clone(), ranking_TE.clone()
            filled_TK, missing_TK = fill_missing(ids_TK, ranking_TE)
            assert_filled(before, ranking_TE, filled_TK)
            assert filled_TK.dtype == torch.int64
            assert missing_TK.tolist() == [[e == MISSING for e in row] for row in before.tolist()]
            assert torch.equal(ids_TK, before), "the ids that came in are someone else's"
            assert torch.equal(ranking_TE.isnan(), ranking_before.isnan())

    @pytest.mark.parametrize("check", [assert_total, assert_filled], ids=["total", "best"])
    @pytest.mark.parametrize("kind", RANKINGS)
    def test_the_cyclic_filler_is_noticed(self, kind: str, check: Callable[..., None]) -> None:
        assert broken(kind, cyclic_fill, check) > 0
        assert broken(kind, lambda *args: fill_missing(*args)[0], check) == 0

    @pytest.mark.parametrize("kind", ["groups", "infinities"])
    def test_the_ranking_that_ties_taken_experts_with_masked_ones_is_noticed(self, kind: str) -> None:
        assert broken(kind, one_hot_fill, assert_total) > 0
        assert broken("random", one_hot_fill, assert_filled) == 0, "else this control controls nothing"

    def test_the_row_of_the_tie_at_minus_infinity(self) -> None:
        """Experts outside of the group and experts already there are both -inf in LLM360/miles#11."""
        ids_TK = torch.tensor([[0, 1, 2, 3, 4, 5, MISSING, MISSING]])
        ranking_TE = torch.full((1, 16), -INF)
        ranking_TE[0, :6] = torch.rand(6)
        assert one_hot_fill(ids_TK, ranking_TE).tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
        assert fill_missing(ids_TK, ranking_TE)[0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]

    @pytest.mark.parametrize(
        ("row", "ranking", "expected"),
        [
            ([MISSING] * 3, [NAN] * 5, [0, 1, 2]),
            ([MISSING] * 3, [-INF] * 5, [0, 1, 2]),
            ([MISSING] * 3, [INF] * 5, [0, 1, 2]),
            ([MISSING, 0, MISSING], [INF, NAN, 0.5, -INF, 0.25], [2, 0, 4]),
            ([MISSING, 2, MISSING], [-INF, NAN, 0.5, INF, -INF], [3, 2, 0]),
            ([4, MISSING, 1], [-INF, 0.0, NAN, -INF, 0.0], [4, 0, 1]),
            ([MISSING, 3, 1, MISSING, 0], [0.1, 0.2, 0.3, 0.4, 0.5], [4, 3, 1, 2, 0]),
        ],
    )
    def test_rows_worked_out_by_hand(self, row: list[int], ranking: list[float], expected: list[int]) -> None:
        filled_TK, _ = fill_missing(torch.tensor([row]), torch.tensor([ranking]))
        assert filled_TK.tolist() == [expected]
        assert filled_slowly(row, ranking) == expected

    def test_no_tokens(self) -> None:
        filled_TK, missing_TK = fill_missing(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 8))
        assert filled_TK.shape == missing_TK.shape == (0, 3)

    def test_rows_do_not_see_each_other(self) -> None:
        ids_TK, ranking_TE = cases("ties")[-1]
        together_TK, _ = fill_missing(ids_TK, ranking_TE)
        alone = [fill_missing(*row)[0] for row in zip(ids_TK.split(1), ranking_TE.split(1), strict=True)]
        assert torch.equal(torch.cat(alone), together_TK)


class Sizes(TorchDispatchMode):
    """The number of elements of whatever an op returns."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.sizes += [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


class TestSize:
    """No (T, K, E) tensor in between: at T=32K, E=256, K=8 it would take 0.5 GiB."""

    NUM_TOKENS, TOP_K, NUM_EXPERTS = 256, 8, 64

    def largest(self, fill: Callable[[Tensor, Tensor], Any]) -> int:
        ids_TK = distinct_ids(self.NUM_TOKENS, num_experts=self.NUM_EXPERTS, top_k=self.TOP_K)
        ids_TK[:, ::2] = MISSING
        ranking_TE = draw(self.NUM_TOKENS, self.NUM_EXPERTS)
        with Sizes() as mode:
            fill(ids_TK, ranking_TE)
        return max(mode.sizes)

    def test_is_that_of_the_scores(self) -> None:
        largest = self.largest(fill_missing)
        assert self.NUM_TOKENS * self.NUM_EXPERTS <= largest <= self.NUM_TOKENS * (self.NUM_EXPERTS + 1)

    def test_one_hot_is_noticed(self) -> None:
        assert self.largest(one_hot_fill) == self.NUM_TOKENS * self.TOP_K * self.NUM_EXPERTS


# --- balanced fill


def loads(ids_TK: Tensor, num_experts: int, ep_size: int) -> tuple[list[int], list[int]]:
    """Assignments per expert, and per EP rank."""
    per_expert, per_rank = [0] * num_experts, [0] * ep_size
    for e in ids_TK.flatten().tolist():
        per_expert[e] += 1
        per_rank[e // (num_experts // ep_size)] += 1
    return per_expert, per_rank


def balanced(tokens_T: Tensor, num_experts: int, top_k: int, ep_size: int) -> Tensor:
    """The ids of rows that miss all of theirs."""
    ids_TK = torch.full((len(tokens_T), top_k), MISSING)
    return fill_missing(ids_TK, balanced_ranking(tokens_T, num_experts, top_k, ep_size))[0]


class TestBalanced:
    @pytest.mark.parametrize("first", [0, 1001, 2**45 + 3])
    @pytest.mark.parametrize(
        ("num_experts", "top_k"), [(64, 8), (64, 6), (40, 3), (256, 8), (8, 1), (16, 16)]
    )
    def test_loads_differ_by_one_at_most(self, num_experts: int, top_k: int, first: int) -> None:
        ids_TK = balanced(first + torch.arange(4096), num_experts, top_k, ep_size=8)
        assert_total(torch.full_like(ids_TK, MISSING), ids_TK, num_experts)
        for load in loads(ids_TK, num_experts, ep_size=8):
            assert max(load) - min(load) <= 1

    @pytest.mark.parametrize("ep_size", [1, 2, 8])
    @pytest.mark.parametrize("top_k", [1, 3, 8])
    def test_so_for_every_stretch_of_tokens(self, top_k: int, ep_size: int) -> None:
        for first, number in [(0, 1), (0, 2), (5, 3), (7, 5), (11, 8), (2, 21), (40, 63)]:
            ids_TK = balanced(torch.arange(first, first + number), 16, top_k, ep_size)
            for load in loads(ids_TK, 16, ep_size):
                assert max(load) - min(load) <= 1

    def test_padding_ranked_by_score_is_noticed(self) -> None:
        """Padding shares one hidden state, so its scores send all of it to the same K experts."""
        ids_TK = torch.full((4096, 8), MISSING)
        filled_TK, _ = fill_missing(ids_TK, draw(1, 64).expand(4096, 64))
        for load in loads(filled_TK, 64, ep_size=8):
            assert max(load) - min(load) > 1

    def test_experts_in_id_order_are_noticed(self) -> None:
        """Balanced over experts, not over ranks, when there are few tokens."""
        ids_TK = balanced(torch.arange(3), 64, 8, ep_size=1)
        assert max(loads(ids_TK, 64, ep_size=1)[0]) == 1
        assert loads(ids_TK, 64, ep_size=8)[1] == [8, 8, 8, 0, 0, 0, 0, 0]

    def test_hangs_on_the_global_index_only(self) -> None:
        tokens_T = torch.arange(500, 900)
        whole_TK = balanced(tokens_T, 64, 6, ep_size=8)
        shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(0))
        assert torch.equal(balanced(tokens_T[shuffled], 64, 6, ep_size=8), whole_TK[shuffled])
        assert torch.equal(balanced(tokens_T[123:137], 64, 6, ep_size=8), whole_TK[123:137])
        assert torch.equal(balanced(tokens_T[::7], 64, 6, ep_size=8), whole_TK[::7])

    @pytest.mark.parametrize("mask", MASKS)
    def test_partly_missing_rows(self, mask: str) -> None:
        chance = random.Random(0)
        ids_TK = distinct_ids(64, num_experts=16, top_k=8)
        missing = [[MASKS[mask](k, 8, chance) for k in range(8)] for _ in range(64)]
        ids_TK[torch.tensor(missing)] = MISSING
        ranking_TE = balanced_ranking(torch.arange(64), 16, 8, ep_size=4)
        assert_filled(ids_TK, ranking_TE, fill_missing(ids_TK, ranking_TE)[0])

    def test_ranking_is_a_permutation(self) -> None:
        for num_experts, ep_size in ((1, 1), (8, 2), (64, 8), (40, 8)):
            ranking_TE = balanced_ranking(torch.arange(50), num_experts, 1, ep_size)
            assert ranking_TE.dtype == torch.float32
            expected = [[-float(e) for e in range(num_experts)]] * 50
            assert ranking_TE.sort(1, descending=True).values.tolist() == expected


# --- ingest

B, L = 3, 6
LAYERS = [LayerShape(f"layers.{number}.moe", 16, 4) for number in (1, 2, 5)]


def rollout(layers: Sequence[LayerShape] = LAYERS, batch: int = B, length: int = L, seed: int = 0) -> Tensor:
    """``(B, L, layers, K)`` int64 that every layer can take."""
    columns = [
        distinct_ids(batch, length, num_experts=layer.num_experts, top_k=layer.top_k, seed=seed + number)
        for number, layer in enumerate(layers)
    ]
    return torch.stack(columns, dim=2)


def take(ids: Tensor, layers: Sequence[LayerShape] = LAYERS, **options: Any) -> Tensor:
    return ingest(ids, layers, **{"batch_size": B, "seq_len": L, **options})


def refusal(ids: Tensor, layers: Sequence[LayerShape] = LAYERS, **options: Any) -> str:
    """What ingest says to it; one line."""
    with pytest.raises(ReplayDataError) as error:
        take(ids, layers, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def lengths_mask(lengths: Sequence[int]) -> Tensor:
    """``(B, L)``: True for the first of each sample."""
    return torch.tensor([[position < length for position in range(L)] for length in lengths])


class TestIngestTakes:
    @pytest.mark.parametrize("flat", [True, False])
    def test_the_grid_in_its_order(self, flat: bool) -> None:
        ids_BLCK = rollout()
        got_NGK = take(ids_BLCK.flatten(0, 1) if flat else ids_BLCK)
        assert got_NGK.shape == (B * L, len(LAYERS), 4)
        for sample in range(B):
            for token in range(L):
                assert got_NGK[sample * L + token].tolist() == ids_BLCK[sample, token].tolist()

    def test_samples_without_their_last_row(self) -> None:
        """The last token of a rollout was never routed."""
        ids_BLCK = rollout()
        got_BLGK = take(ids_BLCK[:, :-1]).unflatten(0, (B, L))
        assert got_BLGK[:, :-1].tolist() == ids_BLCK[:, :-1].tolist()
        assert got_BLGK[:, -1].eq(MISSING).all()

    def test_exactly_one_missing_row_at_the_end(self) -> None:
        ids_BLCK = rollout()
        ids_BLCK[1, -1] = MISSING
        assert take(ids_BLCK).tolist() == ids_BLCK.flatten(0, 1).tolist()

    @pytest.mark.parametrize("tokens", [[0, 1, 2], [2, 3], [0, 2, 3, 5]], ids=["head", "middle", "both"])
    def test_missing_rows_that_are_no_tail(self, tokens: list[int]) -> None:
        """Prompts that a rollout engine had cached."""
        ids_BLCK = rollout()
        ids_BLCK[1, tokens] = MISSING
        assert take(ids_BLCK).tolist() == ids_BLCK.flatten(0, 1).tolist()

    def test_partly_missing_rows(self) -> None:
        ids_BLCK = rollout()
        ids_BLCK[:, :, :, 1:3] = MISSING
        ids_BLCK[:, -3:, :, :3] = MISSING
        assert take(ids_BLCK).tolist() == ids_BLCK.flatten(0, 1).tolist()

    @pytest.mark.parametrize("shorter", [0, 1], ids=["L", "L-1"])
    def test_padding_that_misses_any_number_of_rows(self, shorter: int) -> None:
        """Samples of n tokens come with n - 1 rows and are padded to the longest."""
        ids_BLCK, lengths = rollout(), (6, 2, 4)
        for sample, length in enumerate(lengths):
            ids_BLCK[sample, length - 1 :] = MISSING
        got_NGK = take(ids_BLCK[:, : L - shorter], valid_BL=lengths_mask(lengths))
        assert got_NGK.tolist() == ids_BLCK.flatten(0, 1).tolist()
        assert "sample 1, token 1: [-1, -1, -1, -1] is one of several" in refusal(ids_BLCK)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
    @pytest.mark.parametrize("rows", [L, L - 1])
    def test_any_signed_dtype_alike(self, dtype: torch.dtype, rows: int) -> None:
        for num_experts in (16, 127):
            layers = [layer._replace(num_experts=num_experts) for layer in LAYERS]
            ids_BLCK = rollout(layers)[:, :rows]
            ids_BLCK[0, 2, :, 1] = MISSING
            expected = take(ids_BLCK, layers)
            got = take(ids_BLCK.to(dtype), layers)
            assert got.dtype == expected.dtype == torch.int8
            assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        ("dtype", "num_experts"),
        [
            (torch.int8, 128),
            (torch.int8, 129),
            (torch.int8, 256),
            (torch.int8, 266),
            (torch.int8, 300),
            (torch.int16, 32768),
            (torch.int16, 32769),
            (torch.int16, 65536 + 9),
        ],
    )
    def test_ids_narrower_than_the_number_of_experts(self, dtype: torch.dtype, num_experts: int) -> None:
        """``narrowest_dtype(128)`` is int8, which does not hold 128 itself."""
        layers = [LayerShape("layers.1.moe", num_experts, 2)]
        top = torch.iinfo(dtype).max
        ids_BLCK = torch.tensor([[0, top], [44, 99], [MISSING, 7]], dtype=dtype).view(1, 3, 1, 2)
        got_NGK = take(ids_BLCK, layers, batch_size=1, seq_len=3)
        assert got_NGK.flatten().tolist() == [0, top, 44, 99, MISSING, 7]

    @pytest.mark.parametrize(
        ("num_experts", "dtype"),
        [
            (1, torch.int8),
            (128, torch.int8),
            (129, torch.int16),
            (256, torch.int16),
            (257, torch.int16),
            (32768, torch.int16),
            (32769, torch.int32),
        ],
    )
    def test_width_by_the_number_of_experts(self, num_experts: int, dtype: torch.dtype) -> None:
        """By E and never by the ids seen: 0 and E - 1 come back, and so does MISSING."""
        assert narrowest_dtype(num_experts) == dtype
        layers = [LayerShape("a", num_experts, 1), LayerShape("b", 1, 1)]
        for largest in {min(1, num_experts - 1), num_experts - 1}:
            ids = torch.tensor([[0, 0], [MISSING, MISSING], [largest, 0]])
            got = take(ids.view(1, 3, 2, 1), layers, batch_size=1, seq_len=3)
            assert got.dtype == dtype
            assert got.flatten(1).tolist() == ids.tolist()

    def test_columns_of_a_model_with_dense_layers(self) -> None:
        """Rollout engines index over all decoder layers; the dense ones hold what they like."""
        decoder = rollout([LayerShape("any", 16, 4)] * 6)
        decoder[:, :, [0, 3, 4]] = 777
        got_NGK = take(decoder, columns=[1, 2, 5])
        assert got_NGK.tolist() == decoder[:, :, [1, 2, 5]].flatten(0, 1).tolist()
        swapped_NGK = take(decoder, columns=(5, 1, 2))
        assert swapped_NGK.tolist() == decoder[:, :, [5, 1, 2]].flatten(0, 1).tolist()

    @pytest.mark.parametrize("columns", [None, [0, 1, 2]], ids=["all", "named"])
    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
    def test_a_copy(self, columns: list[int] | None, dtype: torch.dtype) -> None:
        """A view would pin a rollout batch, and change with it."""
        parent = torch.cat([rollout(), rollout(seed=9)]).to(dtype)
        before = parent.clone()
        for ids in (parent[:B], parent[:B, :-1], parent[:B].flatten(0, 1)):
            got_NGK = take(ids, columns=columns)
            storage = got_NGK.untyped_storage()
            assert storage.data_ptr() != parent.untyped_storage().data_ptr()
            assert storage.nbytes() == got_NGK.numel() * got_NGK.element_size()
            assert got_NGK.is_contiguous()
            assert got_NGK.device.type == "cpu"
            assert torch.equal(parent, before)

    @pytest.mark.parametrize(("batch_size", "seq_len"), [(0, 4), (2, 0), (2, 1)])
    def test_small_grids(self, batch_size: int, seq_len: int) -> None:
        ids_BLCK = rollout(batch=batch_size, length=seq_len)
        got_NGK = take(ids_BLCK, batch_size=batch_size, seq_len=seq_len)
        assert got_NGK.tolist() == ids_BLCK.flatten(0, 1).tolist()

    def test_one_pick_of_one_token_may_be_expert_0(self) -> None:
        """Not a layer that was never captured."""
        layers = [LayerShape("layers.1.moe", 16, 1)]
        for length in (1, 2):
            got = take(torch.zeros(1, 1, 1, 1, dtype=torch.int32), layers, batch_size=1, seq_len=length)
            assert got.flatten().tolist() == [0, MISSING][:length]


class TestIngestRefuses:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32, torch.bfloat16, torch.bool])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        """uint8 makes 255 of -1."""
        expected = f"routed_experts is {dtype}, not int8, int16, int32 or int64"
        assert refusal(rollout().to(dtype)) == expected

    @pytest.mark.parametrize("difference", [-2, -1, 0, 1])
    @pytest.mark.parametrize("batch_size", [1, B])
    @pytest.mark.parametrize("flat", [True, False])
    def test_numbers_of_rows(self, flat: bool, batch_size: int, difference: int) -> None:
        """Flat, no row may lack: whose would it be? By sample, the last one may."""
        if flat:
            ids = rollout(batch=1, length=batch_size * L + difference)[0]
        else:
            ids = rollout(batch=batch_size, length=L + difference)
        if difference == 0 or (difference == -1 and not flat):
            assert take(ids, batch_size=batch_size).shape[0] == batch_size * L
            return
        said = refusal(ids, batch_size=batch_size)
        assert f"has shape {tuple(ids.shape)}" in said
        assert f"({batch_size * L}, layers, K) or" in said
        assert f"({batch_size}, {L} or {L - 1}, layers, K)" in said

    @pytest.mark.parametrize(
        "shape", [(B * L, 4), (2 * B * L, 3, 4), (B + 1, L, 3, 4), (L, B, 3, 4), (1, B, L, 3, 4), ()]
    )
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        said = refusal(torch.zeros(shape, dtype=torch.int64))
        assert said.startswith(f"routed_experts has shape {shape}; it must be")

    @pytest.mark.parametrize("width", [1, 3, 5])
    def test_other_numbers_of_picks(self, width: int) -> None:
        """Five of four: a shared expert's fused column."""
        wide = [layer._replace(top_k=width) for layer in LAYERS]
        assert refusal(rollout(wide)) == f"layers.1.moe: K is {width}, the layer's is 4"

    def test_a_layer_with_another_number_of_picks(self) -> None:
        layers = [*LAYERS[:2], LAYERS[2]._replace(top_k=2)]
        assert refusal(rollout(), layers) == "layers.5.moe: K is 4, the layer's is 2"

    @pytest.mark.parametrize("where", [(0, 0, 0), (1, 3, 1), (2, 5, 2)])
    @pytest.mark.parametrize("bad", [16, 17, 127, -2, -128, 2**31 - 1, -(2**63)])
    def test_ids_out_of_range(self, bad: int, where: tuple[int, int, int]) -> None:
        sample, token, layer = where
        ids_BLCK = rollout()
        ids_BLCK[sample, token, layer, 2] = bad
        row = ids_BLCK[sample, token, layer].tolist()
        name = LAYERS[layer].name
        expected = f"{name}, sample {sample}, token {token}: {row} has an id outside [-1, 16)"
        assert refusal(ids_BLCK) == expected
        for dtype in (torch.int8, torch.int32):
            if torch.iinfo(dtype).min <= bad <= torch.iinfo(dtype).max:
                assert refusal(ids_BLCK.to(dtype)) == expected

    @pytest.mark.parametrize("pair", [(0, 1), (0, 3), (2, 3)])
    def test_the_same_id_twice(self, pair: tuple[int, int]) -> None:
        ids_BLCK = rollout()
        ids_BLCK[2, 4, 1, pair[1]] = ids_BLCK[2, 4, 1, pair[0]]
        row = ids_BLCK[2, 4, 1].tolist()
        expected = f"layers.2.moe, sample 2, token 4: {row} has the same id twice"
        assert refusal(ids_BLCK) == refusal(ids_BLCK.to(torch.int8)) == expected

    def test_the_same_id_twice_next_to_missing_ones(self) -> None:
        ids_BLCK = rollout()
        ids_BLCK[1, 2, 0] = torch.tensor([MISSING, 7, MISSING, 7])
        said = refusal(ids_BLCK)
        assert said == "layers.1.moe, sample 1, token 2: [-1, 7, -1, 7] has the same id twice"

    def test_a_row_of_zeros(self) -> None:
        """What engines put where they captured nothing."""
        ids_BLCK = rollout()
        ids_BLCK[1, 2, 2] = 0
        said = refusal(ids_BLCK)
        assert said == "layers.5.moe, sample 1, token 2: [0, 0, 0, 0] has the same id twice"

    def test_the_first_of_many(self) -> None:
        ids_BLCK = rollout()
        ids_BLCK[1, 4:, :] = ids_BLCK[2, :, :] = 99
        assert refusal(ids_BLCK).startswith("layers.1.moe, sample 1, token 4: ")

    @pytest.mark.parametrize("rows", ["L", "L-1", "padded"])
    @pytest.mark.parametrize("top_k", [1, 4])
    def test_a_layer_of_zeros(self, top_k: int, rows: str) -> None:
        """Not captured, or not gathered from its pipeline stage. Rows that are missing change nothing."""
        layers = [layer._replace(top_k=top_k) for layer in LAYERS]
        ids_BLCK, valid_BL = rollout(layers), lengths_mask((L, 4, L))
        # With one pick per token, a single sample may well go to expert 0 throughout.
        first = 0 if top_k == 1 else 1
        ids_BLCK[slice(None) if top_k == 1 else 1, :, 1] = 0
        if rows == "padded":
            ids_BLCK[1, 4:] = MISSING
        said = refusal(
            ids_BLCK[:, :-1] if rows == "L-1" else ids_BLCK,
            layers,
            valid_BL=valid_BL if rows == "padded" else None,
        )
        assert said == f"layers.2.moe, sample {first}: every id is 0; the layer was not captured"

    def test_several_missing_rows_at_the_end(self) -> None:
        ids_BLCK = rollout()
        ids_BLCK[1, -3:, 1] = MISSING
        said = refusal(ids_BLCK)
        row = [MISSING] * 4
        expected = f"layers.2.moe, sample 1, token 3: {row} is one of several trailing tokens without ids"
        assert said == expected

    def test_one_more_missing_row_than_the_last(self) -> None:
        """L - 1 rows are one token short already."""
        ids_BLCK = rollout()[:, :-1]
        ids_BLCK[2, -1] = MISSING
        assert refusal(ids_BLCK).startswith("layers.1.moe, sample 2, token 4: ")

    def test_missing_tails_are_those_of_the_valid_tokens(self) -> None:
        """Against a loop: padding anywhere, missing rows anywhere."""
        chance = random.Random(0)
        layers = [LayerShape("layers.1.moe", 16, 2)]
        refused = 0
        for seed in range(300):
            ids_BLCK = rollout(layers, seed=seed)
            valid = [[chance.random() < 0.7 for _ in range(L)] for _ in range(B)]
            missing = [[chance.random() < 0.4 for _ in range(L)] for _ in range(B)]
            ids_BLCK[torch.tensor(missing)] = MISSING
            first_bad = None
            for sample in reversed(range(B)):
                tail = []
                for token in reversed(range(L)):
                    if valid[sample][token] and not missing[sample][token]:
                        break
                    if valid[sample][token]:
                        tail.append(token)
                if len(tail) > 1:
                    first_bad = (sample, tail[-1])
            if first_bad is None:
                assert take(ids_BLCK, layers, valid_BL=torch.tensor(valid)).shape == (B * L, 1, 2)
                continue
            refused += 1
            said = refusal(ids_BLCK, layers, valid_BL=torch.tensor(valid))
            assert said.startswith("layers.1.moe, sample {}, token {}: ".format(*first_bad))
        assert 50 < refused < 250

    @pytest.mark.parametrize("there", [0, 1, 2, 4, 7])
    def test_other_numbers_of_layers(self, there: int) -> None:
        ids = torch.arange(4).expand(B, L, there, 4)
        assert refusal(ids) == (
            f"routed_experts has {there} layers, the model has 3 MoE layers; say with columns which entry "
            "belongs to which"
        )

    @pytest.mark.parametrize("columns", [[0, 1], [0, 1, 2, 3], [0, 1, 6], [], [-1, 0, 1], [0, 1, -7]])
    def test_columns_that_are_not_there(self, columns: list[int]) -> None:
        """A negative one is nobody's: many use -1 for a layer that is dense."""
        decoder = rollout([LayerShape("any", 16, 4)] * 6)
        assert "say with columns which entry belongs to which" in refusal(decoder, columns=columns)

    def test_names_the_layer_of_a_column(self) -> None:
        decoder = rollout([LayerShape("any", 16, 4)] * 6)
        decoder[1, 3, 5, 0] = 16
        said = refusal(decoder, columns=[1, 2, 5])
        assert re.match(r"layers\.5\.moe, sample 1, token 3: \[16, .*\] has an id outside \[-1, 16\)", said)

    @pytest.mark.parametrize("shape", [(L,), (1, L), (B, 1), (B, L - 1), (B * L,), (L, B)])
    def test_a_valid_mask_of_another_shape(self, shape: tuple[int, ...]) -> None:
        """Broadcast, it would call other tokens padding."""
        assert "valid_BL" in refusal(rollout(), valid_BL=torch.ones(shape, dtype=torch.bool))

    def test_a_valid_mask_of_ones_and_zeros(self) -> None:
        """An attention mask is int64 in many trainers: ``~1`` is true as well, and all would be padding."""
        ids_BLCK = rollout()
        ids_BLCK[1, 1:3] = MISSING  # no tail
        ids_BLCK[2, 3:] = MISSING  # one valid token and padding
        valid_BL = lengths_mask((6, 6, 4))
        assert take(ids_BLCK, valid_BL=valid_BL).tolist() == ids_BLCK.flatten(0, 1).tolist()
        assert "valid_BL" in refusal(ids_BLCK, valid_BL=valid_BL.long())


# --- the router with a source that replays

T, D, E = 13, 8, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 4},
    "norm": {"top_k": 4, "route_norm": True, "route_scale": 2.5},
    "groups": {"top_k": 4, "num_expert_groups": 4, "num_limited_groups": 1},
    "groups_norm": {"top_k": 4, "num_expert_groups": 8, "num_limited_groups": 2, "route_norm": True},
    "top1": {"top_k": 1},
    "top1_groups": {"top_k": 1, "num_expert_groups": 4, "num_limited_groups": 1, "route_scale": 0.5},
    "all": {"top_k": E, "route_norm": True},
}


def build(gate_ED: Tensor, **options: Any) -> TokenChoiceTopKRouter:
    num_experts, dim = gate_ED.shape
    router = TokenChoiceTopKRouter.Config(
        num_experts=num_experts,
        gate=Linear.Config(in_features=dim, out_features=num_experts, bias=False),
        **options,
    ).build()
    router.gate.weight = torch.nn.Parameter(gate_ED.detach().clone())
    return router


def replaying(choice: Selection, **options: Any) -> TokenChoiceTopKRouter:
    """A router whose source always makes this choice."""
    router = build(draw(E, D, seed=2) / 2, **options)
    router.selector = lambda _query: choice
    return router


def outside_of_groups(router: TokenChoiceTopKRouter, x_TD: Tensor, bias_E: Tensor) -> Tensor:
    """``(T, E)``: what the router's own ranking rules out."""
    seen: list[Tensor] = []

    def source(query: Query) -> Selection:
        seen.append(query.ranking())
        return Selection(query.live())

    before, router.selector = router.selector, source
    router(x_TD, bias_E)
    router.selector = before
    return seen[0] == -INF


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
class TestReplayedScores:
    @pytest.mark.parametrize("name", OPTIONS)
    def test_are_the_unbiased_unmasked_ones(self, name: str, score_func: str) -> None:
        """Those of the oracle for these ids, and so are the gradients of tokens and gate."""
        options = {"score_func": score_func, **OPTIONS[name]}
        ids_TK = distinct_ids(T, num_experts=E, top_k=options["top_k"], seed=7)
        router = replaying(Selection(ids_TK), **options)
        x_TD, bias_E = draw(T, D, seed=1).requires_grad_(), 0.5 * draw(E, seed=3)
        if "groups" in name:
            assert outside_of_groups(router, x_TD, bias_E).gather(1, ids_TK).any(1).sum() > T // 2
        gate_ED = router.gate.weight.detach().clone().requires_grad_()
        _, expected_TK = oracle.route(x_TD, gate_ED, expert_bias_E=bias_E, ids_TK=ids_TK, **options)
        grad_TK = draw(T, options["top_k"], seed=4)
        expected = torch.autograd.grad(expected_TK, (x_TD, gate_ED), grad_TK)
        routing = router(x_TD, bias_E)
        got = torch.autograd.grad(routing.topk_scores_TK, (x_TD, router.gate.weight), grad_TK)
        assert torch.equal(routing.topk_expert_ids_TK, ids_TK)
        assert routing.topk_scores_TK.isfinite().all()
        torch.testing.assert_close(routing.topk_scores_TK, expected_TK, rtol=1e-12, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("name", ["groups", "groups_norm", "top1_groups"])
    def test_reach_the_gate_from_outside_of_the_groups(self, name: str, score_func: str) -> None:
        """Gathered from masked scores, the weight of such a pick is 0 or NaN and its gate learns nothing."""
        options = {"score_func": score_func, **OPTIONS[name]}
        x_TD, bias_E = draw(T, D, seed=1), torch.zeros(E).double()
        ruled_out_TE = outside_of_groups(replaying(Selection(torch.empty(0)), **options), x_TD, bias_E)
        ids_TK = ruled_out_TE.int().argsort(dim=1, descending=True, stable=True)[:, : options["top_k"]]
        assert ruled_out_TE.gather(1, ids_TK).all()
        router = replaying(Selection(ids_TK), **options)
        routing = router(x_TD, bias_E)
        assert (routing.topk_scores_TK > 0).all()
        (routing.topk_scores_TK * draw(T, options["top_k"], seed=4)).sum().backward()
        assert router.gate.weight.grad is not None
        assert router.gate.weight.grad.isfinite().all()
        assert router.gate.weight.grad[ids_TK.unique()].any(1).all()

    def test_follow_the_columns(self, score_func: str) -> None:
        """Bitwise: the order of the picks is the order in which a combine adds them."""
        ids_TK = distinct_ids(T, num_experts=E, top_k=4, seed=7)
        x_TD = draw(T, D, seed=1)
        routing = replaying(Selection(ids_TK), score_func=score_func, top_k=4)(x_TD)
        for order in ([3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]):
            permuted = replaying(Selection(ids_TK[:, order]), score_func=score_func, top_k=4)(x_TD)
            assert torch.equal(permuted.topk_expert_ids_TK, ids_TK[:, order])
            assert torch.equal(permuted.topk_scores_TK, routing.topk_scores_TK[:, order])
            assert torch.equal(permuted.num_tokens_per_expert_E, routing.num_tokens_per_expert_E)


def weights_by_hand(
    x_TD: Tensor,
    gate_ED: Tensor,
    ids_TK: Tensor,
    weightless_TK: Tensor,
    grad_TK: Tensor,
    *,
    score_func: str,
    route_norm: bool,
    route_scale: float,
) -> tuple[Tensor, Tensor]:
    """The weights, and the gate's gradient worked out on paper."""
    weights_TK, gate_grad_ED = torch.zeros_like(grad_TK), torch.zeros_like(gate_ED)
    for t, ids in enumerate(ids_TK.tolist()):
        logits = [float(gate_ED[e] @ x_TD[t]) for e in range(gate_ED.shape[0])]
        if score_func == "sigmoid":
            scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        else:
            total = sum(map(math.exp, logits))
            scores = [math.exp(logit) / total for logit in logits]
        live = [k for k in range(len(ids)) if not weightless_TK[t, k]]
        norm = sum(scores[ids[k]] for k in live) if route_norm else 1.0
        shared = sum(float(grad_TK[t, k]) * scores[ids[k]] / norm for k in live) if route_norm else 0.0
        by_score = [0.0] * len(scores)
        for k in live:
            weights_TK[t, k] = route_scale * scores[ids[k]] / norm
            by_score[ids[k]] = route_scale * (float(grad_TK[t, k]) - shared) / norm
        mean = sum(grad * score for grad, score in zip(by_score, scores, strict=True))
        for e, (grad, score) in enumerate(zip(by_score, scores, strict=True)):
            by_logit = score * (1 - score) * grad if score_func == "sigmoid" else score * (grad - mean)
            gate_grad_ED[e] += by_logit * x_TD[t]
    return weights_TK, gate_grad_ED


class TestWeightless:
    """``fill_weight="zero"``: a filled pick is computed, and counts for nothing."""

    @pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("route_norm", [True, False])
    @pytest.mark.parametrize("weightless", ["some", "all_of_a_row", "none"])
    def test_values_and_gradients(self, weightless: str, route_norm: bool, score_func: str) -> None:
        options = {"score_func": score_func, "route_norm": route_norm, "route_scale": 1.5}
        ids_TK, x_TD = distinct_ids(T, num_experts=E, top_k=4, seed=7), draw(T, D, seed=1)
        weightless_TK = draw(T, 4, seed=8) > 0.3
        weightless_TK[:, 1] = False
        if weightless == "none":
            weightless_TK[:] = False
        if weightless == "all_of_a_row":
            weightless_TK[5] = True
        router = replaying(Selection(ids_TK, weightless_TK=weightless_TK), top_k=4, **options)
        grad_TK = draw(T, 4, seed=4)
        weights_TK, gate_grad_ED = weights_by_hand(
            x_TD, router.gate.weight.detach(), ids_TK, weightless_TK, grad_TK, **options
        )
        routing = router(x_TD)
        routing.topk_scores_TK.backward(grad_TK)
        torch.testing.assert_close(routing.topk_scores_TK, weights_TK, rtol=1e-12, atol=0)
        torch.testing.assert_close(router.gate.weight.grad, gate_grad_ED, rtol=1e-10, atol=1e-13)
        assert routing.topk_scores_TK[weightless_TK].eq(0).all()
        assert torch.equal(routing.topk_expert_ids_TK, ids_TK)
        assert routing.num_tokens_per_expert_E.sum() == ids_TK.numel(), "they are dispatched all the same"

    @pytest.mark.parametrize("zero", [True, False], ids=["zero", "live"])
    def test_the_gate_of_an_expert_that_was_only_filled(self, zero: bool) -> None:
        """Nothing at all reaches it, to the bit; with a live weight something does (the control)."""
        ids_TK = distinct_ids(T, num_experts=E - 1, top_k=4, seed=7)
        ids_TK[:, 2] = E - 1
        weightless_TK = ids_TK == E - 1
        choice = Selection(ids_TK, weightless_TK=weightless_TK if zero else None)
        router = replaying(choice, top_k=4, route_norm=True)
        scores_TK = router(draw(T, D, seed=1)).topk_scores_TK
        (scores_TK * draw(T, 4, seed=4)).sum().backward()
        assert router.gate.weight.grad is not None
        assert router.gate.weight.grad[E - 1].any() != zero
        sums_T = scores_TK.masked_fill(weightless_TK, 0).sum(1)
        assert torch.allclose(sums_T, torch.ones_like(sums_T), rtol=1e-12) == zero

    def test_a_row_without_weight_is_zero_in_fp32_as_well(self) -> None:
        """0 / 1e-20, whose gradient 1e20 must not leave its place."""
        ids_TK = distinct_ids(T, num_experts=E, top_k=4, seed=7)
        weightless_TK = torch.zeros(T, 4, dtype=torch.bool)
        weightless_TK[3] = True
        router = replaying(Selection(ids_TK, weightless_TK=weightless_TK), top_k=4, route_norm=True)
        router.gate.weight = torch.nn.Parameter(router.gate.weight.detach().float())
        x_TD = draw(T, D, seed=1, dtype=torch.float32).requires_grad_()
        scores_TK = router(x_TD).topk_scores_TK
        scores_TK.backward(1e10 * draw(T, 4, seed=4, dtype=torch.float32))
        assert scores_TK[3].tolist() == [0.0] * 4
        assert x_TD.grad is not None
        assert router.gate.weight.grad is not None
        assert x_TD.grad[3].eq(0).all()
        assert x_TD.grad.isfinite().all()
        assert router.gate.weight.grad.isfinite().all()


class TestLoad:
    @pytest.mark.parametrize("counting", ["some", "none", "all"])
    def test_leaves_padding_out(self, counting: str) -> None:
        """Of the load; dispatchers still need to know of every row."""
        ids_TK = distinct_ids(T, num_experts=E, top_k=4, seed=7)
        load_T = {"some": draw(T) > 0, "none": torch.zeros(T).bool(), "all": torch.ones(T).bool()}[counting]
        routing: Routing = replaying(Selection(ids_TK, load_T=load_T), top_k=4)(draw(T, D, seed=1))
        every, counted = [0] * E, [0] * E
        for t, ids in enumerate(ids_TK.tolist()):
            for e in ids:
                every[e] += 1
                counted[e] += int(load_T[t])
        assert routing.num_tokens_per_expert_E.tolist() == every
        assert routing.counted_E.tolist() == counted
        assert routing.counted_E.dtype == routing.num_tokens_per_expert_E.dtype == torch.int64
        assert (every != counted) == (counting != "all")

    def test_is_everything_unless_told(self) -> None:
        ids_TK = distinct_ids(T, num_experts=E, top_k=4, seed=7)
        routing = replaying(Selection(ids_TK), top_k=4)(draw(T, D, seed=1))
        assert routing.load_E is None
        assert torch.equal(routing.counted_E, routing.num_tokens_per_expert_E)

    def test_no_tokens(self) -> None:
        nothing = Selection(torch.empty(0, 4, dtype=torch.int64), load_T=torch.empty(0, dtype=torch.bool))
        routing = replaying(nothing, top_k=4)(torch.empty(0, D).double())
        assert routing.counted_E.tolist() == routing.num_tokens_per_expert_E.tolist() == [0] * E


# --- from installed ids to a routing: what the slot makes of rows with gaps


def layout(batch_size: int, seq_len: int, sp_rank: int = 0, sp_size: int = 1) -> TokenLayout:
    padded = -(-seq_len // sp_size)
    held = min(max(seq_len - sp_rank * padded, 0), padded)
    return TokenLayout(
        local_batch_size=batch_size,
        local_seq_len=held,
        dim=D,
        global_seq_len=seq_len,
        sp_rank=sp_rank,
        sp_size=sp_size,
    )


def gaps(batch_size: int, seq_len: int, top_k: int) -> Tensor:
    """``(B * L, 1, K)`` with partly and fully missing rows, and whole ones."""
    ids_PCK = distinct_ids(batch_size * seq_len, 1, num_experts=E, top_k=top_k, seed=11)
    ids_PCK[draw(*ids_PCK.shape, seed=12) > 0.2] = MISSING
    ids_PCK[::5] = MISSING
    return ids_PCK


class TestThroughSlots:
    def slot(self, **options: Any) -> tuple[TokenChoiceTopKRouter, ReplaySelector]:
        router = build(draw(E, D, seed=2), **options)
        return router, ReplaySelector("layers.1.moe", router, Regions())

    def microbatch(self, ids_PCK: Tensor, tokens_P: Tensor | None = None, **options: Any) -> Microbatch:
        installed = Installed(ids_PCK, {("layers.1.moe", 0): 0}, has_missing=True, **options)
        return Microbatch(
            number=0,
            tokens_P=torch.arange(len(ids_PCK)) if tokens_P is None else tokens_P,
            installed=installed,
        )

    @pytest.mark.parametrize("limited", [1, 2, 4])
    def test_score_fill_is_by_the_routers_own_ranking(self, limited: int) -> None:
        """Biased and group-limited; when the groups are used up, the others by id. Weights stay unmasked."""
        options = {"top_k": 4, "num_expert_groups": 4, "num_limited_groups": limited}
        router, slot = self.slot(**options)
        routes = ReplaySession([slot])
        ids_PCK, x_TD, bias_E = gaps(2, 40, 4), draw(80, D, seed=1), 0.3 * draw(E, seed=3)
        with routes.microbatch(self.microbatch(ids_PCK)):
            routing = router(x_TD, bias_E, layout(2, 40))
        expected, outside = [], 0
        scores_TE = (x_TD @ router.gate.weight.T).sigmoid().detach()
        for t, row in enumerate(ids_PCK[:, 0].tolist()):
            biased = (scores_TE[t] + bias_E).tolist()
            allowed = oracle.choose_experts(biased, 4 * limited, 4, limited)
            order = [*allowed, *(e for e in range(E) if e not in allowed)]
            free = iter([e for e in order if e not in row])
            expected.append([next(free) if e == MISSING else e for e in row])
            outside += sum(e not in allowed for e in expected[-1])
        assert outside > 0 or limited == 4
        assert routing.topk_expert_ids_TK.tolist() == expected
        expected_TK = scores_TE.gather(1, torch.tensor(expected))
        torch.testing.assert_close(routing.topk_scores_TK, expected_TK, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("fill", ["score", "balanced"])
    @pytest.mark.parametrize("fill_weight", ["live", "zero"])
    def test_weight_of_a_filled_pick(self, fill_weight: Any, fill: Any) -> None:
        router, slot = self.slot(top_k=4, route_norm=True)
        ids_PCK = gaps(2, 20, 4)
        with ReplaySession([slot], fill=fill, fill_weight=fill_weight).microbatch(self.microbatch(ids_PCK)):
            routing = router(draw(40, D, seed=1), None, layout(2, 20))
        missing_TK = ids_PCK[:, 0] == MISSING
        assert_total(ids_PCK[:, 0], routing.topk_expert_ids_TK, E)
        assert routing.topk_scores_TK[~missing_TK].gt(0).all()
        filled_K = routing.topk_scores_TK[missing_TK]
        assert (filled_K.eq(0) if fill_weight == "zero" else filled_K.gt(0)).all()

    @pytest.mark.parametrize("fill", ["score", "balanced"])
    @pytest.mark.parametrize("sp_size", [2, 3, 4])
    def test_fill_is_the_same_however_the_tokens_are_split(self, sp_size: int, fill: Any) -> None:
        """Over the ranks of a sequence, uneven splits and empty ranks included."""
        batch_size, seq_len = 2, 9
        router, slot = self.slot(top_k=4)
        routes = ReplaySession([slot], fill=fill, ep_size=8)
        ids_PCK, x_TD = gaps(batch_size, seq_len, 4), draw(batch_size * seq_len, D, seed=1)
        tokens_P = 1000 + torch.arange(batch_size * seq_len)
        with routes.microbatch(self.microbatch(ids_PCK, tokens_P)):
            whole_TK = router(x_TD, None, layout(batch_size, seq_len)).topk_expert_ids_TK
        assert_total(ids_PCK[:, 0], whole_TK, E)
        for sp_rank in range(sp_size):
            part = layout(batch_size, seq_len, sp_rank, sp_size)
            mine = part.global_token_indices()
            with routes.microbatch(self.microbatch(ids_PCK, tokens_P)):
                part_TK = router(x_TD[mine], None, part).topk_expert_ids_TK
            assert torch.equal(part_TK, whole_TK[mine])

    def test_balanced_fill_is_the_same_in_any_microbatch(self) -> None:
        """Eight sequences at once, or two by two in another order: the index of a token is global."""
        seq_len = 10
        router, slot = self.slot(top_k=4)
        routes = ReplaySession([slot], fill="balanced", ep_size=8)
        tokens_BL = torch.arange(8 * seq_len).view(8, seq_len)
        ids_BLK, x_BLD = gaps(8, seq_len, 4).view(8, seq_len, 4), draw(8, seq_len, D, seed=1)

        def routed(sequences: list[int]) -> Tensor:
            tokens_P, ids_PCK = tokens_BL[sequences].flatten(), ids_BLK[sequences].view(-1, 1, 4)
            with routes.microbatch(self.microbatch(ids_PCK, tokens_P)):
                routing = router(x_BLD[sequences].flatten(0, 1), None, layout(len(sequences), seq_len))
            return routing.topk_expert_ids_TK.view(-1, seq_len, 4)

        whole_BLK = routed(list(range(8)))
        for pair in ([6, 1], [3, 0], [2, 7], [5, 4]):
            assert torch.equal(routed(pair), whole_BLK[pair])

    def test_padding_is_balanced_over_ranks_and_is_no_load(self) -> None:
        """4094 rows of padding with one hidden state; eight EP ranks get the same of it."""
        router, slot = self.slot(top_k=3)
        num_tokens = 4096 + 4094  # 4094 * 3 picks leave ten of a round of 16 experts
        routes = ReplaySession([slot], fill="balanced", ep_size=8)
        ids_PCK = distinct_ids(num_tokens, 1, num_experts=E, top_k=3)
        valid_P = torch.arange(num_tokens) < 4096
        ids_PCK[~valid_P] = MISSING
        x_TD = draw(num_tokens, D, seed=1)
        x_TD[~valid_P] = 1.0
        with routes.microbatch(self.microbatch(ids_PCK, valid_P=valid_P)):
            routing = router(x_TD, None, layout(1, num_tokens))
        for load in loads(routing.topk_expert_ids_TK[4096:], E, ep_size=8):
            assert max(load) - min(load) <= 1
        real_E = torch.tensor(loads(ids_PCK[:4096], E, ep_size=8)[0])
        assert torch.equal(routing.counted_E, real_E)
        assert routing.num_tokens_per_expert_E.sum() == num_tokens * 3

    def test_recomputation_keeps_what_was_filled(self) -> None:
        """A fill by score is frozen with the ids: another forward with the moved gate fills otherwise."""
        router, slot = self.slot(top_k=4)
        ids: list[Tensor] = []
        router.register_forward_hook(lambda _module, _args, out: ids.append(out.topk_expert_ids_TK))
        routes, x_TD = ReplaySession([slot]), draw(40, D, seed=1).requires_grad_()
        with set_checkpoint_early_stop(False), routes.microbatch(self.microbatch(gaps(2, 20, 4))):
            out = checkpoint(
                router, x_TD, None, layout(2, 20), use_reentrant=False, context_fn=slot.regions.contexts
            )
            router.gate.weight.data += draw(E, D, seed=5)
            out.topk_scores_TK.sum().backward()
        with routes.microbatch(self.microbatch(gaps(2, 20, 4))):
            router(x_TD, None, layout(2, 20))
        forward_TK, recomputed_TK, another_TK = ids
        assert torch.equal(recomputed_TK, forward_TK)
        assert not torch.equal(another_TK, forward_TK)

    def test_recomputation_that_cannot_know_is_refused(self) -> None:
        router, slot = self.slot(top_k=4)
        routes, x_TD = ReplaySession([slot]), draw(40, D, seed=1).requires_grad_()
        with routes.microbatch(self.microbatch(gaps(2, 20, 4))):
            out = checkpoint(router, x_TD, None, layout(2, 20), use_reentrant=False)
            with pytest.raises(RuntimeError, match=r"layers\.1\.moe: a recomputation outside of a region"):
                out.topk_scores_TK.sum().backward()
