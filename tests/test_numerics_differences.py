"""Captured steps, made by hand: what counts as a difference, which flips are explained, what is a problem."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from titan_moe.numerics import svg
from titan_moe.numerics.compare import Born, Comparison
from titan_moe.numerics.differences import ModuleDifference, StepDifference, places
from titan_moe.numerics.features import distance, features
from titan_moe.numerics.load import Step, _once
from titan_moe.numerics.margins import Groups, margins
from titan_moe.numerics.tolerance import BF16, FP32, Tolerance, relative

TOKENS, DIM, SEQ_LEN, EXPERTS = 64, 512, 16, 8


def _rows(seed: int = 0, tokens: int = TOKENS, dim: int = DIM) -> torch.Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(seed))


def _module(x_TD: torch.Tensor, tokens: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    tokens = torch.arange(len(x_TD)) if tokens is None else tokens
    return _once({"tokens": tokens, **features(x_TD)._asdict()})


def _walk(left: Step, right: Step, tolerance: Tolerance = FP32) -> StepDifference:
    return StepDifference(1, list(left), left, right, tolerance, seq_len=SEQ_LEN)


def _compare(left: torch.Tensor, right: torch.Tensor) -> ModuleDifference:
    return _walk({"m|out": _module(left)}, {"m|out": _module(right)}).modules[0]


class TestFeatures:
    @pytest.mark.parametrize("width", [16, 128, 256, 1000, 1024, 2048, 4096, 7168])
    def test_a_constant_offset_is_seen(self, width: int) -> None:
        """A sum of signs that vanishes for a width would hide a bias."""
        x_TD = _rows(tokens=4, dim=width)
        off_T = distance(features(x_TD).projection_TQ, features(x_TD + 0.5).projection_TQ)
        assert (off_T > 0.1 * 0.5 * width**0.5).all()

    def test_signs_are_not_periodic(self) -> None:
        signs_DQ = features(torch.eye(2048)).projection_TQ
        for lag in range(1, 64):
            assert abs((signs_DQ[lag:] * signs_DQ[:-lag]).mean()) < 0.1

    def test_a_hash_tells_bits_apart(self) -> None:
        """Changes that leave the sum and the first moment of the bits as they are."""
        x_TD = torch.ones(1, DIM)
        bits = x_TD.clone().view(torch.int32)
        bits[0, 10:14] += torch.tensor([1, -1, -1, 1], dtype=torch.int32)
        assert features(x_TD).bits_T != features(bits.view(torch.float32)).bits_T
        assert features(torch.zeros(1, DIM)).bits_T != features(-torch.zeros(1, DIM)).bits_T


class TestModules:
    def test_the_size_of_a_difference_is_estimated(self) -> None:
        x_TD, noise_TD = _rows(), 1e-4 * _rows(1)
        found = _compare(x_TD, x_TD + noise_TD)
        truth = noise_TD.norm(dim=1).square().mean().sqrt() / x_TD.norm(dim=1).square().mean().sqrt()
        assert found.relative == pytest.approx(float(truth), rel=0.2)  # 64 x 4 projections know it to 5%
        assert (found.differing, found.first_token, found.missing) == (TOKENS, 0, 0)

    def test_equal_bits(self) -> None:
        found = _compare(_rows(), _rows())
        assert (found.relative, found.differing, found.first_token, found.beyond) == (0, 0, -1, "no token")

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_a_number_differs(self, value: float) -> None:
        broken = _rows()
        broken[5, 3] = value
        found = _compare(_rows(), broken)
        assert (found.relative, found.worst) == (math.inf, math.inf)
        assert found.beyond == "1 token: sequence 0 position 5"

    def test_both_not_a_number(self) -> None:
        """The same bits are the same bits."""
        broken = _rows()
        broken[5, 3] = math.nan
        found = _compare(broken, broken.clone())
        assert (found.differing, found.relative, found.worst) == (0, 0, 0)

    def test_missing_tokens(self) -> None:
        left, right = _module(_rows()), _module(_rows()[:60], torch.arange(60))
        found = _walk({"m|out": left}, {"m|out": right}).modules[0]
        assert (found.missing, found.first_token, found.relative) == (4, 60, 0)
        assert found.beyond == "4 tokens: sequence 3 positions 12-15"

    def test_replicas_that_disagree(self) -> None:
        """Two ranks hold all tokens; on the second, token 9 is another."""
        other = _rows()
        other[9, 0] += 1
        twice = _module(torch.cat([_rows(), other]), torch.arange(TOKENS).repeat(2))
        found = _walk({"m|out": _module(_rows())}, {"m|out": twice}).modules[0]
        assert (found.replicas, found.differing) == (1, 0)


def _route(ids: torch.Tensor, margin: torch.Tensor, scores_TE: torch.Tensor) -> dict[str, torch.Tensor]:
    scores = features(scores_TE)
    columns = {"ids": ids, "margin": margin, "score": scores.projection_TQ, "score_norm": scores.norm_T}
    return _once({"tokens": torch.arange(len(ids)), **columns})


def _two_layers(flipped: dict[int, tuple[int, float]], moved: float = 1e-8) -> tuple[Step, Step]:
    """Layers 0 and 1, each with a router and an output; tokens to (layer, margin) that flip there."""
    steps: tuple[Step, Step] = ({}, {})
    for layer in (0, 1):
        margin = torch.full((TOKENS,), 0.5, dtype=torch.float64)
        ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
        others = ids.clone()
        for token, (where, how_far) in flipped.items():
            if where == layer:
                others[token], margin[token] = torch.tensor([0, 2]), how_far
        scores_TE = _rows(layer, dim=EXPERTS).double().sigmoid()
        noise_TE = moved * _rows(layer + 7, dim=EXPERTS).double()
        steps[0][f"{layer}|route"] = _route(ids, margin, scores_TE)
        steps[1][f"{layer}|route"] = _route(others, margin, scores_TE + noise_TE)
        for step in steps:
            step[f"{layer}|out"] = _module(_rows(layer))
    return steps


class TestRoutes:
    def test_near_ties_and_others(self) -> None:
        first, second = _walk(*_two_layers({3: (0, 1e-7), 40: (0, 0.2), 9: (1, 0.2), 60: (1, 0.2)})).flips
        assert (first.flipped, first.near, first.following, first.suspicious) == (2, 1, 0, 1)
        assert (first.first_token, first.first_suspicious) == (3, 40)
        # Attention has carried the flip of token 3 to token 9, but not to the last sequence.
        assert (second.flipped, second.following, second.suspicious) == (2, 1, 1)
        assert second.first_suspicious == 60

    def test_what_comes_before_a_flip_does_not_follow_it(self) -> None:
        _, second = _walk(*_two_layers({9: (0, 1e-7), 3: (1, 0.2)})).flips
        assert (second.following, second.suspicious, second.first_suspicious) == (0, 1, 3)

    def test_where_all_scores_moved_a_wider_margin_is_near(self) -> None:
        assert _walk(*_two_layers({3: (0, 1e-4)})).flips[0].suspicious == 1
        moved = _walk(*_two_layers({3: (0, 1e-4)}, moved=1e-5)).flips[0]
        assert (moved.near, moved.suspicious) == (1, 0)

    def test_but_not_any_margin(self) -> None:
        """Scores that have nothing to do with each other excuse no clear flip, and are a problem, too."""
        found = _walk(*_two_layers({3: (0, 0.1)}, moved=0.3))
        assert found.flips[0].suspicious == 1
        assert found.flips[0].moved > 0.1

    def test_tokens_that_flip_explicably_do_not_count_from_there_on(self) -> None:
        left, right = _two_layers({7: (0, 1e-7)})
        other = _rows(0)
        other[7] = -other[7]
        right["0|out"] = _module(other)
        found = _walk(left, right).modules[0]
        assert (found.relative, found.differing, found.beyond) == (0, 1, "no token")
        left, right = _two_layers({7: (1, 1e-7)})  # the flip comes after the fault: no excuse
        right["0|out"] = _module(other)
        assert _walk(left, right).modules[0].beyond == "1 token: sequence 0 position 7"
        left, right = _two_layers({7: (0, 0.3)})  # against a clear margin: no excuse
        right["0|out"] = _module(other)
        assert _walk(left, right).modules[0].relative > 0.1

    def test_margins_of_groups(self) -> None:
        """Group sums are 1.5, 1.0 and 0.9; half the gap of the last two is less than that of the experts."""
        scores = torch.tensor([[0.9, 0.6, 0.55, 0.45, 0.5, 0.4]])
        assert float(margins(scores, 2, None)) == pytest.approx(0.05)
        assert float(margins(scores, 2, Groups(3, 2))) == pytest.approx(0.05)
        assert float(margins(scores, 4, Groups(3, 2))) == pytest.approx(0.05)  # all of both groups
        assert float(margins(scores, 6, None)) == math.inf
        assert float(margins(scores, 2, Groups(3, 1))) == pytest.approx(0.25)


class TestPlaces:
    @pytest.mark.parametrize(
        ("tokens", "words"),
        [
            ([], "no token"),
            ([0], "1 token: sequence 0 position 0"),
            ([14, 15, 16], "3 tokens: sequence 0 positions 14-15, sequence 1 position 0"),
            ([1, 3, 5, 7], "4 tokens: sequence 0 position 1, sequence 0 position 3, sequence 0 position 5"),
        ],
    )
    def test_words(self, tokens: list[int], words: str) -> None:
        assert places(torch.tensor(tokens, dtype=torch.int64), SEQ_LEN).startswith(words)


SAME = ModuleDifference(
    step=1,
    module="layers.0.moe",
    relative=0.0,
    absolute=0.0,
    worst=0.0,
    tokens=TOKENS,
    differing=0,
    first_token=-1,
    worst_token=-1,
    missing=0,
    replicas=0,
    beyond="no token",
)
FLIPS = _walk(*_two_layers({}, moved=0.0)).flips[0]


def _found(**changes: Any) -> Comparison:
    """A comparison in which everything is equal, but for ``changes``."""
    same: dict[str, Any] = {
        "losses": [(1, 2.0, 2.0), (2, 1.0, 1.0)],
        "grad_norms": [(1, 3.0, 3.0), (2, 3.0, 3.0)],
        "gradients": {"w": (0.0, 1.0)},
        "gradient_norms": {"w": {1: 1.0, 2: 1.0}},
        "modules": [SAME],
        "flips": [FLIPS],
    }
    return Comparison(tolerance=FP32, dtype="float32", **(same | changes))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "loss, not a number": ({"losses": [(1, 2.0, math.nan)]}, "loss at step 1: 2 and nan"),
    "loss of the first step": ({"losses": [(1, 2.0, 2.0001)]}, "loss at step 1"),
    "loss later": ({"losses": [(1, 2.0, 2.0), (2, 2.0, 2.1)]}, "loss at step 2: 2 and 2.1"),
    "learning rate": ({"rates": [(2, [1e-3], [2e-3])]}, r"learning rates at step 2: [0.001] and [0.002]"),
    "grad_norm": ({"grad_norms": [(1, 3.0, 3.1)]}, "grad_norm at step 1: 3 and 3.1"),
    "grad_norm later": ({"grad_norms": [(2, 3.0, math.nan)]}, "grad_norm at step 2: 3 and nan"),
    "a gradient": ({"gradients": {"w": (1e-3, 1.0)}}, "gradient of w by 0.001 of its norm, norm ratio 1"),
    "a gradient of nothing": ({"gradients": {"w": (math.inf, 0.0)}}, "gradient of w by inf"),
    "a later gradient": (
        {"gradient_norms": {"w": {1: 1.0, 2: 9.0}}},
        "gradient norm of w at step 2, ratio 9",
    ),
    "a later gradient is gone": (
        {"gradient_norms": {"w": {2: 0.0}}},
        "gradient norm of w at step 2, ratio 0",
    ),
    "a module": ({"modules": [dataclasses.replace(SAME, relative=1e-3)]}, "layers.0.moe at step 1 by 0.001"),
    "one token": ({"modules": [dataclasses.replace(SAME, worst=1e-3)]}, "layers.0.moe at step 1"),
    "a module later": (
        {"modules": [SAME, dataclasses.replace(SAME, step=2, relative=2.0)]},
        "layers.0.moe at step 2 by 2",
    ),
    "replicas": (
        {"modules": [dataclasses.replace(SAME, replicas=4)]},
        "ranks of one run do not agree on layers.0.moe at step 1, 4 tokens",
    ),
    "scores": ({"flips": [dataclasses.replace(FLIPS, moved=0.1)]}, "scores of 0 at step 1 by 0.1"),
    "a flip": (
        {"flips": [dataclasses.replace(FLIPS, flipped=1, suspicious=1, first_suspicious=7)]},
        "0 at step 1 sends 1 of 64 tokens to other experts against a clear margin, first token 7",
    ),
    "a bias": ({"expert_biases": [(2, "layers.1.moe")]}, "layers.1.moe at step 2, before any route flips"),
    "steps of one run": ({"alone": ["steps 3 to 20"]}, "only one run has steps 3 to 20"),
    "nothing captured": (
        {"modules": [], "gradients": {}},
        "no modules and no gradients were captured in both",
    ),
}


class TestVerdict:
    def test_bitwise(self) -> None:
        assert _found().verdict == "bitwise equal over 2 steps"

    @pytest.mark.parametrize("what", WRONG)
    def test_every_rule(self, what: str) -> None:
        changes, words = WRONG[what]
        found = _found(**changes)
        assert words in found.verdict
        assert found.verdict.startswith("different: ")

    @pytest.mark.parametrize(
        "changes",
        [
            {"losses": [(1, 2.0, 2.0), (2, 2.0, 2.0001)]},
            {"grad_norms": [(1, 3.0, 3.00001)]},
            {"gradients": {"w": (1e-6, 1.0)}},
            {"gradient_norms": {"w": {2: 1.001}}},
            {"modules": [dataclasses.replace(SAME, differing=1, relative=1e-7)]},
            {"flips": [dataclasses.replace(FLIPS, flipped=1, near=1)]},
            {
                "expert_biases": [(2, "layers.1.moe")],
                "flips": [dataclasses.replace(FLIPS, flipped=1, near=1)],
            },
        ],
    )
    def test_small_differences_are_not_bitwise_and_no_problem(self, changes: dict[str, Any]) -> None:
        assert _found(**changes).verdict.startswith("within float32 tolerance over ")

    def test_relative(self) -> None:
        assert [relative(2.0, 2.0), relative(2.0, 1.0), relative(math.nan, math.nan)] == [0, 0.5, 0]
        assert [relative(2.0, math.nan), relative(math.inf, 1.0), relative(math.nan, 1.0)] == [math.inf] * 3

    def test_tolerances(self) -> None:
        assert (Tolerance.of("float32"), Tolerance.of("bfloat16")) == (FP32, BF16)
        assert Tolerance.of("float32", loss=1e-2) == dataclasses.replace(FP32, loss=1e-2)

    def test_share_of_moe(self) -> None:
        moe = dataclasses.replace(SAME, absolute=3.0)
        attention = dataclasses.replace(SAME, module="layers.0.attention", absolute=1.0)
        assert Born(sublayers=[], flipped=0).share_of_moe == 0
        assert Born(sublayers=[moe, attention], flipped=0).share_of_moe == pytest.approx(0.9)


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

    def test_what_is_not_a_number_is_no_equality(self) -> None:
        broken = [svg.bars({"w": math.inf}), svg.lines({"a": [(1, math.inf)]}, log=True)]
        broken.append(svg.heat(["m"], ["1"], {("m", "1"): math.inf}))
        assert not any("no difference" in drawn for drawn in broken)
        same = [svg.bars({"w": 0.0}), svg.lines({"a": [(1, 0.0)]}, log=True)]
        same.append(svg.heat(["m"], ["1"], {("m", "1"): 0.0}))
        assert all("no difference" in drawn for drawn in same)

    def test_maps_and_bars(self) -> None:
        drawn = svg.heat(["m"], ["1", "2", "3"], {("m", "1"): 0.0, ("m", "2"): math.inf})
        assert [color in drawn for color in ("#ffffff", "#e6e6e6")] == [True, True]
        assert svg.heat([], [], {}).startswith("<svg")
        assert svg.bars({"w": math.inf, "v": 1.0}).count("<rect") == 2
        hundred = [str(step) for step in range(100)]
        assert 'width="4' in svg.heat(["m"], hundred, {("m", step): 1.0 for step in hundred})[:200]
