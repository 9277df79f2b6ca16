"""Two captured steps, made by hand: what counts as a difference, and which flips are explained."""

import dataclasses
import math

import pytest
import torch

from titan_moe.numerics import svg
from titan_moe.numerics.compare import Born, Comparison, relative
from titan_moe.numerics.differences import (
    Flips,
    ModuleDifference,
    Step,
    compare_modules,
    compare_routes,
    places,
)
from titan_moe.numerics.features import features
from titan_moe.numerics.tolerance import BF16, FP32, Tolerance

TOKENS, DIM, SEQ_LEN = 64, 512, 16


def _module(x_TD: torch.Tensor, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tokens = torch.arange(len(x_TD)) if tokens is None else tokens
    return {"tokens": tokens, **features(x_TD)._asdict()}


def _of_modules(
    left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], *flips: Flips
) -> ModuleDifference:
    steps = ({"m|out": left}, {"m|out": right})
    (found,) = compare_modules(1, ["m|out"], *steps, FP32, seq_len=SEQ_LEN, flips=list(flips))
    return found


def _compare(left: torch.Tensor, right: torch.Tensor) -> ModuleDifference:
    return _of_modules(_module(left), _module(right))


def _rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


class TestModules:
    def test_the_size_of_a_difference_is_estimated(self) -> None:
        x_TD, noise_TD = _rows(), 1e-4 * _rows(1)
        found = _compare(x_TD, x_TD + noise_TD)
        truth = noise_TD.norm(dim=1).square().mean().sqrt() / x_TD.norm(dim=1).square().mean().sqrt()
        assert found.relative == pytest.approx(float(truth), rel=0.3)  # 64 projections know it to 9%
        assert (found.differing, found.first_token, found.missing) == (TOKENS, 0, 0)

    def test_equal_bits(self) -> None:
        found = _compare(_rows(), _rows())
        assert (found.relative, found.differing, found.first_token, found.beyond) == (0, 0, -1, "no token")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_a_number_differs(self, value: float) -> None:
        broken = _rows()
        broken[5, 3] = value
        found = _compare(_rows(), broken)
        assert found.relative == math.inf
        assert found.beyond == "1 token: sequence 0 position 5"

    def test_both_not_a_number(self) -> None:
        """The same bits are the same bits."""
        broken = _rows()
        broken[5, 3] = math.nan
        assert _compare(broken, broken.clone()).differing == 0

    def test_missing_tokens(self) -> None:
        found = _of_modules(_module(_rows()), _module(_rows()[:60], torch.arange(60)))
        assert (found.missing, found.first_token, found.relative) == (4, 60, 0)
        assert found.beyond == "4 tokens: sequence 3 positions 12-15"

    def test_tokens_that_flip_explicably_do_not_count(self) -> None:
        x_TD, other = _rows(), _rows()
        other[7] = -other[7]
        near, clear = _flips(margin=1e-6), _flips(margin=0.3)
        assert (near.explained, clear.explained) == ([7], [])
        found = _of_modules(_module(x_TD), _module(other), near)
        assert (found.relative, found.differing, found.beyond) == (0, 1, "no token")
        assert _of_modules(_module(x_TD), _module(other), clear).relative > 0.1


def _route(ids: torch.Tensor, margin: torch.Tensor, score: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"tokens": torch.arange(len(ids)), "ids": ids, "margin": margin, "score": score}


def _two_layers(flipped: dict[int, tuple[int, float]]) -> tuple[Step, Step]:
    """Tokens to (layer, margin) that flip there; every score differs by 1e-7."""
    steps: tuple[Step, Step] = ({}, {})
    for layer in (0, 1):
        margin = torch.full((TOKENS,), 0.5, dtype=torch.float64)
        ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
        others = ids.clone()
        for token, (where, how_far) in flipped.items():
            if where == layer:
                others[token], margin[token] = torch.tensor([0, 2]), how_far
        score = torch.ones(TOKENS, dtype=torch.float64)
        steps[0][f"{layer}|route"] = _route(ids, margin, score)
        steps[1][f"{layer}|route"] = _route(others, margin, score + 1e-7)
    return steps


def _flips(margin: float) -> Flips:
    left, right = _two_layers({7: (0, margin)})
    return compare_routes(1, ["0|route", "1|route"], left, right, FP32)[0]


class TestRoutes:
    def test_near_ties_and_others(self) -> None:
        left, right = _two_layers({3: (0, 1e-5), 9: (0, 0.2), 11: (1, 0.2)})
        first, second = compare_routes(1, ["0|route", "1|route"], left, right, FP32)
        assert (first.flipped, first.near, first.following, first.suspicious) == (2, 1, 0, 1)
        assert (first.first_token, first.first_suspicious) == (3, 9)
        assert (second.flipped, second.suspicious, second.first_suspicious) == (1, 1, 11)

    def test_a_token_that_flipped_before(self) -> None:
        left, right = _two_layers({3: (0, 1e-5)})
        for step, ids in ((left, [0, 1]), (right, [0, 3])):
            step["1|route"]["ids"][3] = torch.tensor(ids)
        _, second = compare_routes(1, ["0|route", "1|route"], left, right, FP32)
        assert (second.flipped, second.near, second.following, second.suspicious) == (1, 0, 1, 0)

    def test_where_all_scores_moved_a_wider_margin_is_near(self) -> None:
        left, right = _two_layers({3: (0, 0.01)})
        assert compare_routes(1, ["0|route"], left, right, FP32)[0].suspicious == 1
        right["0|route"]["score"] += 1e-3
        assert compare_routes(1, ["0|route"], left, right, FP32)[0].near == 1


class TestPlaces:
    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            ([], "no token"),
            ([0], "1 token: sequence 0 position 0"),
            ([14, 15, 16], "3 tokens: sequence 0 positions 14-15, sequence 1 position 0"),
            (
                [1, 3, 5, 7],
                "4 tokens: sequence 0 position 1, sequence 0 position 3, sequence 0 position 5",
            ),
        ],
    )
    def test_words(self, tokens: list[int], words: str) -> None:
        assert places(torch.tensor(tokens, dtype=torch.int64), SEQ_LEN).startswith(words)


class TestVerdict:
    def _of(self, **changes: object) -> Comparison:
        same = Comparison(tolerance=FP32, dtype="float32", losses=[(1, 2.0, 2.0)])
        return dataclasses.replace(same, **changes)

    def test_bitwise(self) -> None:
        assert self._of().verdict == "bitwise equal over 1 step"

    def test_a_loss_that_is_not_a_number(self) -> None:
        assert relative(2.0, math.nan) == math.inf
        assert self._of(losses=[(1, 2.0, math.nan)]).verdict == "different: loss at step 1: 2 and nan"

    def test_other_learning_rates(self) -> None:
        found = self._of(rates=[(1, [1e-3], [1e-3]), (2, [1e-3], [2e-3])])
        assert found.problems == ["learning rates at step 2: [0.001] and [0.002]"]

    def test_first_losses_are_held_tighter(self) -> None:
        assert self._of(losses=[(1, 2.0, 2.0), (2, 2.0, 2.0001)]).problems == []
        assert self._of(losses=[(1, 2.0, 2.0001), (2, 2.0, 2.0)]).problems != []

    def test_a_gradient_in_one_run_only(self) -> None:
        found = self._of(gradients={"w": (math.inf, 0.0)})
        assert found.problems == ["gradient of w by inf of its norm, norm ratio 0"]

    def test_tolerances(self) -> None:
        assert (Tolerance.of("float32"), Tolerance.of("bfloat16")) == (FP32, BF16)
        assert Tolerance.of("float32", loss=1e-2) == dataclasses.replace(FP32, loss=1e-2)

    def test_share_of_moe(self) -> None:
        assert Born(sublayers=[], flipped=0).share_of_moe == 0


class TestPlots:
    def test_lines(self) -> None:
        drawn = svg.lines({"a <b>": [(1, 1.0), (2, 0.0), (3, math.nan)]}, log=True)
        assert drawn.count("<circle") == 2  # what is not a number is left out
        assert 'fill="#fff" stroke' in drawn  # a zero on a log axis is hollow
        assert "a &lt;b&gt;" in drawn
        assert "nan" not in drawn

    @pytest.mark.parametrize("log", [False, True])
    @pytest.mark.parametrize("curve", [[], [(1, 0.0)], [(1, 3.0)], [(n, 10.0**-n) for n in range(1, 101)]])
    def test_any_length(self, curve: svg.Curve, log: bool) -> None:
        assert svg.lines({"a": curve}, log=log).startswith("<svg")

    def test_maps_and_bars(self) -> None:
        drawn = svg.heat(["m"], ["1", "2", "3"], {("m", "1"): 0.0, ("m", "2"): math.inf})
        assert [color in drawn for color in ("#ffffff", "#e6e6e6")] == [True, True]
        assert svg.heat([], [], {}).startswith("<svg")
        assert "no difference" in svg.bars({"w": 0.0})
        assert svg.bars({"w": math.inf, "v": 1.0}).count("<rect") == 2
