"""The oracle is the judge of everything else, so it is judged by hand and by finite differences."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle import MODULE_FQNS, choose_experts, moe, named_gradients, random_case


def test_hand_worked() -> None:
    """Two tokens, three experts, K=2, D=F=1, softmax.

    x = 1 and 2. Gate weights ln 1, ln 2, ln 3, so softmax(gate * x) is proportional to e+1 to the power x:

        token 0 (x=1): scores 1/6, 2/6, 3/6     -> experts 2, 1 with weights 3/6, 2/6
        token 1 (x=2): scores 1/14, 4/14, 9/14  -> experts 2, 1 with weights 9/14, 4/14

    Expert e: w1 = 1, w3 = e+1, w2 = 1, so expert e of x is silu(x) * (e+1) * x:

        token 0: silu(1) * 1 * (3/6 * 3 + 2/6 * 2)   = silu(1) * 13/6
        token 1: silu(2) * 2 * (9/14 * 3 + 4/14 * 2) = silu(2) * 5

    with silu(1) = 1/(1+1/e) and silu(2) = 2/(1+1/e^2). Expert 0 gets no token; 1 and 2 get two each.
    """
    result = moe(
        x_BLD=torch.tensor([[[1.0], [2.0]]], dtype=torch.float64),
        gate_ED=torch.tensor([[math.log(1)], [math.log(2)], [math.log(3)]], dtype=torch.float64),
        w1_EFD=torch.ones(3, 1, 1, dtype=torch.float64),
        w2_EDF=torch.ones(3, 1, 1, dtype=torch.float64),
        w3_EFD=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1),
        top_k=2,
        score_func="softmax",
    )
    silu = {x: x / (1 + math.exp(-x)) for x in (1, 2)}
    expected_BLD = torch.tensor([[[silu[1] * 13 / 6], [silu[2] * 5]]], dtype=torch.float64)
    expected_TK = torch.tensor([[3 / 6, 2 / 6], [9 / 14, 4 / 14]], dtype=torch.float64)
    torch.testing.assert_close(result.out_BLD, expected_BLD, rtol=1e-14, atol=0)
    torch.testing.assert_close(result.topk_scores_TK, expected_TK, rtol=1e-14, atol=0)
    assert result.topk_ids_TK.tolist() == [[2, 1], [2, 1]]
    assert result.counts_E.tolist() == [0, 2, 2]
    assert result.counts_E.dtype == result.topk_ids_TK.dtype == torch.int64


def test_shared_expert_adds_one_swiglu_for_every_token() -> None:
    case = random_case(0, 1, 3, 4, 5, 4, 2, shared=True, shared_F=7)
    routed = {name: t for name, t in case.params.items() if not name.startswith("shared")}
    without = moe(**routed, **case.options).out_BLD
    w1_FD, w2_DF, w3_FD = (case.params[f"shared_{name}"] for name in ("w1_FD", "w2_DF", "w3_FD"))
    x_BLD = case.params["x_BLD"]
    shared_BLD = (torch.nn.functional.silu(x_BLD @ w1_FD.T) * (x_BLD @ w3_FD.T)) @ w2_DF.T
    torch.testing.assert_close(case.run().out_BLD, without + shared_BLD, rtol=1e-12, atol=1e-14)


def test_bias_selects_but_does_not_weigh() -> None:
    """Sigmoid scores 0.5 + small; a bias of 1 on expert 0 makes it first, with its own small score."""
    case = random_case(1, 1, 2, 4, 3, 3, 1)
    bias_E = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    result = moe(**case.params, **case.options, expert_bias_E=bias_E)
    score_T1 = torch.sigmoid(case.params["x_BLD"].view(2, 4) @ case.params["gate_ED"][0]).view(2, 1)
    assert result.topk_ids_TK.tolist() == [[0], [0]]
    torch.testing.assert_close(result.topk_scores_TK, score_T1, rtol=1e-14, atol=0)


def test_ties_go_to_the_lower_id() -> None:
    assert choose_experts([0.5, 0.7, 0.7, 0.5], 3) == [1, 2, 0]
    assert choose_experts([0.5] * 4, 4) == [0, 1, 2, 3]
    result = random_case(0, 2, 3, 4, 4, 6, 2, routing="equal_scores").run()
    assert result.topk_ids_TK.tolist() == [[0, 1]] * 6


def test_group_limited_by_hand() -> None:
    """Six experts in three groups; a group's score is the sum of its two best.

        scores   .9 .1 | .6 .5 | .4 .2
        groups    1.0  |  1.1  |  .6     keep one: {2, 3}; keep two: {2, 3, 0, 1}

    Expert 0 is the best of all, yet with one group it cannot be chosen.
    """
    scores = [0.9, 0.1, 0.6, 0.5, 0.4, 0.2]
    assert choose_experts(scores, 2, 3, 1) == [2, 3]
    assert choose_experts(scores, 3, 3, 2) == [0, 2, 3]
    assert choose_experts(scores, 2, 3, 3) == choose_experts(scores, 2) == [0, 2]
    # Groups of three: the third best of a group does not count (1.1 beats .9 + .1 though it sums to less).
    assert choose_experts([0.9, 0.1, 0.1, 0.6, 0.5, 0.0], 1, 2, 1) == [3]
    # Equal groups: the lower one stays.
    assert choose_experts([0.5, 0.5, 0.5, 0.5], 2, 2, 1) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((3, 2, 1), "2 experts"), ((5,), "4 experts"), ((0,), "between 1"), ((1, 3, 1), "do not fit 4 experts")],
)
def test_impossible_selection_is_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_experts([0.4, 0.3, 0.2, 0.1], *arguments)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_route_norm_and_scale(score_func: Any) -> None:
    plain = random_case(3, 1, 4, 6, 4, 5, 3, score_func=score_func).run().topk_scores_TK
    both = random_case(3, 1, 4, 6, 4, 5, 3, score_func=score_func, route_norm=True, route_scale=2.5).run()
    torch.testing.assert_close(
        both.topk_scores_TK, 2.5 * plain / plain.sum(1, keepdim=True), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(both.topk_scores_TK.sum(1), torch.full((4,), 2.5, dtype=torch.float64))


def test_columns_descend_and_counts_count() -> None:
    case = random_case(4, 2, 5, 8, 4, 7, 3, bias_scale=0.3)
    result = case.run()
    assert case.expert_bias_E is not None
    selection_TE = (
        torch.sigmoid(case.params["x_BLD"].view(10, 8) @ case.params["gate_ED"].T) + case.expert_bias_E
    )
    chosen_TK = selection_TE.gather(1, result.topk_ids_TK)
    assert (chosen_TK.diff(dim=1) < 0).all()
    assert torch.equal(result.topk_ids_TK, selection_TE.topk(3).indices)
    assert torch.equal(result.counts_E, torch.bincount(result.topk_ids_TK.flatten(), minlength=7))


def test_given_routes_are_followed() -> None:
    """The chosen routes, given back, change nothing; other routes take this router's scores of theirs."""
    case = random_case(5, 1, 4, 6, 4, 5, 2)
    own = case.run()
    assert torch.equal(case.run(own.topk_ids_TK).out_BLD, own.out_BLD)
    ids_TK = torch.tensor([[4, 0], [3, 1], [0, 2], [1, 4]])
    other = case.run(ids_TK)
    scores_TE = torch.sigmoid(case.params["x_BLD"].view(4, 6) @ case.params["gate_ED"].T)
    assert torch.equal(other.topk_ids_TK, ids_TK)
    torch.testing.assert_close(other.topk_scores_TK, scores_TE.gather(1, ids_TK), rtol=1e-13, atol=0)
    assert not torch.allclose(other.out_BLD, own.out_BLD)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score_func": "softmax", "route_norm": True, "route_scale": 2.5},
        {"shared": True, "bias_scale": 0.3},
        {"num_expert_groups": 2, "num_limited_groups": 1, "route_norm": True},
        {"routing": "one_expert"},
        {"routing": "one_rank"},
    ],
    ids=str,
)
def test_gradcheck(options: dict[str, Any]) -> None:
    case = random_case(6, 1, 3, 3, 2, 4, 2, **options)
    names = list(case.params)

    def layer(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        result = moe(
            **dict(zip(names, tensors, strict=True)), **case.options, expert_bias_E=case.expert_bias_E
        )
        return result.out_BLD, result.topk_scores_TK

    assert torch.autograd.gradcheck(layer, tuple(case.params.values()))


def test_score_gradient_is_expert_output_times_grad_out() -> None:
    """d out_t / d score_tk is the k-th expert's output, so its gradient is a dot product."""
    case = random_case(7, 1, 3, 4, 3, 4, 2)
    result, grads = case.run_with_gradients()
    p = {name: t.detach() for name, t in case.params.items()}
    for t in range(3):
        x_D = p["x_BLD"][0, t]
        for k, e in enumerate(result.topk_ids_TK[t].tolist()):
            expert_D = p["w2_EDF"][e] @ (
                torch.nn.functional.silu(p["w1_EFD"][e] @ x_D) * (p["w3_EFD"][e] @ x_D)
            )
            torch.testing.assert_close(grads["topk_scores_TK"][t, k], expert_D @ case.grad_out_BLD[0, t])


def test_idle_experts_get_zero_gradients() -> None:
    _, grads = random_case(8, 1, 4, 4, 3, 5, 2, routing="one_expert").run_with_gradients()
    for name in ("w1_EFD", "w2_EDF", "w3_EFD"):
        assert (grads[name][:3] == 0).all()
        assert (grads[name][3:] != 0).all()


def test_regimes() -> None:
    one_expert = random_case(9, 2, 8, 8, 4, 8, 2, routing="one_expert").run()
    assert one_expert.counts_E.tolist() == [0] * 6 + [16, 16]
    one_rank = random_case(9, 2, 8, 8, 4, 8, 2, routing="one_rank", ep=2).run()
    assert one_rank.counts_E[4:].sum() == 0
    assert (one_rank.counts_E[:4] > 0).all()
    last_rank = random_case(9, 2, 8, 8, 4, 8, 2, routing="one_rank", ep=4, hot_rank=3).run()
    assert last_rank.counts_E.tolist() == [0] * 6 + [16, 16]
    everywhere = random_case(9, 2, 8, 8, 4, 8, 8).run()
    assert everywhere.counts_E.tolist() == [16] * 8
    with pytest.raises(ValueError, match=r"top_k \(3\) <= experts per EP rank \(2\)"):
        random_case(9, 1, 1, 8, 4, 8, 3, routing="one_rank", ep=4)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_random_routes_survive_fp32(score_func: Any) -> None:
    options: dict[str, Any] = {"score_func": score_func, "num_expert_groups": 4, "num_limited_groups": 2}
    fp64 = random_case(10, 2, 64, 16, 4, 32, 4, **options).run()
    fp32 = random_case(10, 2, 64, 16, 4, 32, 4, dtype=torch.float32, **options).run()
    assert torch.equal(fp64.topk_ids_TK, fp32.topk_ids_TK)
    assert fp32.out_BLD.dtype == torch.float32
    torch.testing.assert_close(fp32.out_BLD.double(), fp64.out_BLD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("B", "L"), [(2, 0), (0, 3)])
def test_no_tokens(B: int, L: int) -> None:
    case = random_case(11, B, L, 4, 3, 5, 2, shared=True)
    result, grads = case.run_with_gradients()
    assert result.out_BLD.shape == (B, L, 4)
    assert result.topk_ids_TK.shape == result.topk_scores_TK.shape == (0, 2)
    assert result.counts_E.tolist() == [0] * 5
    assert all((grads[name] == 0).all() and grads[name].shape == t.shape for name, t in case.params.items())


@pytest.mark.parametrize("name", ["x_BLD", *MODULE_FQNS])
def test_perturbing_a_weight_moves_its_own_gradient(name: str) -> None:
    """Negative control: the loss answers to a nudge of one weight exactly as that weight's gradient says.

    Swap two names in the result and this fails, as the last line checks.
    """
    case = random_case(12, 1, 5, 6, 6, 4, 2, shared=True)
    result, grads = case.run_with_gradients()
    nudged = {key: t.detach().clone() for key, t in case.params.items()}
    direction = torch.randn(
        nudged[name].shape, generator=torch.Generator().manual_seed(13), dtype=torch.float64
    )
    nudged[name] += 1e-6 * direction
    moved = moe(**nudged, **case.options, ids_TK=result.topk_ids_TK)
    observed = ((moved.out_BLD - result.out_BLD) * case.grad_out_BLD).sum().detach() / 1e-6
    torch.testing.assert_close(observed, (grads[name] * direction).sum(), rtol=1e-4, atol=1e-6)
    for other in set(grads) - {name}:
        if grads[other].shape == direction.shape:
            assert abs(float((grads[other] * direction).sum() - observed)) > 1e-2


def test_named_gradients_of_another_layer() -> None:
    """The helper also serves the layer under test: plain output, unused tensors become zeros."""
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    grads = named_gradients({"x": x, "unused": unused}, x * 2, torch.tensor([1.0, 2.0, 3.0]))
    assert grads["x"].tolist() == [2.0, 4.0, 6.0]
    assert grads["unused"].tolist() == [0.0, 0.0]
