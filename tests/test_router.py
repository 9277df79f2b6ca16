"""TokenChoiceTopKRouter against the oracle; its promises about dtypes, ties, bias and distinct ids."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.common.linear import Linear

from tests import oracle
from titan_moe.layer import router as router_module
from titan_moe.layer.dispatch.base import Routing
from titan_moe.layer.router import TokenChoiceTopKRouter, _top_k

T, D, E = 13, 16, 8


def build(gate_ED: Tensor, **options: Any) -> TokenChoiceTopKRouter:
    num_experts, dim = gate_ED.shape
    router = TokenChoiceTopKRouter.Config(
        num_experts=num_experts,
        gate=Linear.Config(in_features=dim, out_features=num_experts, bias=False),
        **options,
    ).build()
    router.gate.weight = torch.nn.Parameter(gate_ED.detach().clone())
    return router


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SELECTIONS: dict[str, dict[str, Any]] = {
    "top1": {"top_k": 1},
    "top3": {"top_k": 3},
    "all": {"top_k": E},
    "groups": {"top_k": 3, "num_expert_groups": 4, "num_limited_groups": 2},
    "one_group": {"top_k": 2, "num_expert_groups": 2, "num_limited_groups": 1},
    "all_groups": {"top_k": E, "num_expert_groups": 2, "num_limited_groups": 2},
}
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"route_norm": True},
    "scale": {"route_scale": 2.5},
    "norm_scale": {"route_norm": True, "route_scale": 0.3},
}


@pytest.mark.parametrize("bias_scale", [0.0, 0.3], ids=["no_bias", "bias"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_equals_the_oracle(score_func: str, weighting: str, selection: str, bias_scale: float) -> None:
    """fp64: ids with their order, scores, and the gradients of tokens and gate."""
    options = {"score_func": score_func, **WEIGHTINGS[weighting], **SELECTIONS[selection]}
    x_TD, gate_ED = draw(T, D, seed=1).requires_grad_(), draw(E, D, seed=2) / 4
    gate_ED.requires_grad_()
    bias_E = bias_scale * draw(E, seed=3) if bias_scale else None
    ids_TK, scores_TK = oracle.route(x_TD, gate_ED, expert_bias_E=bias_E, **options)
    grad_TK = draw(*scores_TK.shape, seed=4)
    expected = torch.autograd.grad(scores_TK, (x_TD, gate_ED), grad_TK)
    router = build(gate_ED, **options)
    routing = router(x_TD, bias_E)
    got = torch.autograd.grad(routing.topk_scores_TK, (x_TD, router.gate.weight), grad_TK)
    assert routing.topk_expert_ids_TK.tolist() == ids_TK.tolist()
    torch.testing.assert_close(routing.topk_scores_TK, scores_TK, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


class TestTies:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_go_to_the_lower_id(self, selection: str) -> None:
        assert not any(self._misrouted(gate_ED, **SELECTIONS[selection]) for gate_ED in self._gates())

    def test_are_noticed_when_topk_breaks_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(router_module, "_top_k", lambda scores_TE, k: scores_TE.topk(k).indices)
        assert any(self._misrouted(gate_ED, **SELECTIONS["top3"]) for gate_ED in self._gates())

    def _gates(self) -> list[Tensor]:
        """Scores that are all equal, that have two values, and four values twice."""
        return [
            torch.zeros(E, D).double(),
            draw(2, D, seed=5).round().repeat_interleave(4, 0),
            draw(4, D).round().repeat(2, 1),
        ]

    def _misrouted(self, gate_ED: Tensor, **options: Any) -> list[int]:
        """Tokens whose choice is not the oracle's. Integers: equal rows of the gate give equal scores."""
        x_TD = draw(T, D, seed=6).round()
        expected_TK, _ = oracle.route(x_TD, gate_ED, **options)
        ids_TK = build(gate_ED, **options)(x_TD).topk_expert_ids_TK
        return (ids_TK != expected_TK).any(1).nonzero().flatten().tolist()

    @pytest.mark.parametrize("E", [2, 8, 256])
    def test_fp32_and_fp64_choose_alike(self, E: int) -> None:
        """They order by different means: whole bits, and a stable sort."""
        scores_TE = self._many_ties(E)
        assert torch.equal(_top_k(scores_TE, 2), _top_k(scores_TE.double(), 2))

    def test_bits_of_negative_scores_run_backwards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Negative control: fp32's bits as they are choose otherwise."""
        scores_TE = self._many_ties(8)
        monkeypatch.setattr(router_module, "_keys", lambda scores_TE: scores_TE.view(torch.int32))
        assert not torch.equal(_top_k(scores_TE, 2), _top_k(scores_TE.double(), 2))

    def _many_ties(self, num_experts: int) -> Tensor:
        """fp32: of both signs, with equal ones, infinite ones, subnormal ones, and neighbours."""
        scores_TE = draw(512, num_experts, dtype=torch.float32)
        scores_TE[::3] = scores_TE[::3].round() + 0.0
        scores_TE[1::4, : num_experts // 2] = float("-inf")
        scores_TE[2::5] *= 1e-44
        scores_TE += 0.0  # no -0: fp32's bits tell it from 0, and no score is one
        return torch.where(draw(512, num_experts, seed=9) > 1, scores_TE.nextafter(scores_TE + 1), scores_TE)

    def test_do_not_hang_on_the_other_tokens(self) -> None:
        """A token alone is routed as in company."""
        router = build(draw(2, D).round().repeat(64, 1), top_k=8)
        x_TD = draw(256, D, seed=1).round()
        alone = [router(x_D).topk_expert_ids_TK for x_D in x_TD.split(1)]
        assert torch.equal(router(x_TD).topk_expert_ids_TK, torch.cat(alone))


class TestDtypes:
    @pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_bf16_gate_is_an_fp32_matmul(self, score_func: str, autocast: bool) -> None:
        x_TD, gate_ED = draw(T, D, dtype=torch.bfloat16), draw(E, D, seed=1, dtype=torch.bfloat16)
        logits_TE = F.linear(x_TD.float(), gate_ED.float())
        scores_TE = logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(-1)
        router = build(gate_ED, top_k=3, score_func=score_func)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            routing = router(x_TD)
            in_bf16 = F.linear(x_TD, gate_ED)
        assert routing.topk_scores_TK.dtype == torch.float32
        assert torch.equal(routing.topk_scores_TK, scores_TE.gather(1, routing.topk_expert_ids_TK))
        assert not torch.equal(in_bf16.float(), logits_TE), "the data must tell fp32 from bf16"

    def test_its_gradients_do_not_follow_autocast(self) -> None:
        gradients = []
        for autocast in (False, True):
            x_TD = draw(T, D, dtype=torch.bfloat16).requires_grad_()
            scores_TK = build(draw(E, D, seed=1, dtype=torch.bfloat16), top_k=3)(x_TD).topk_scores_TK
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                gradients += torch.autograd.grad(scores_TK.sum(), x_TD)
        assert torch.equal(*gradients)

    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_scores_are_fp32_or_wider(self, dtype: torch.dtype, autocast: bool) -> None:
        x_TD = draw(T, D, dtype=dtype).requires_grad_()
        router = build(draw(E, D, seed=1, dtype=dtype), top_k=2, route_norm=True, route_scale=2.5)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            routing = router(x_TD)
        wide = torch.promote_types(dtype, torch.float32)
        assert routing.topk_scores_TK.dtype == wide
        seen: list[torch.dtype] = []
        routing.topk_scores_TK.register_hook(lambda grad: seen.append(grad.dtype))
        routing.topk_scores_TK.square().sum().backward()
        assert seen == [wide]
        assert x_TD.grad is not None
        assert router.gate.weight.grad is not None
        assert x_TD.grad.dtype == router.gate.weight.grad.dtype == dtype

    def test_bf16_gradients_are_rounded_once(self) -> None:
        """Those of the fp32 computation, to bf16 at the very end."""
        x_TD = draw(T, D, dtype=torch.bfloat16).requires_grad_()
        router = build(draw(E, D, seed=1, dtype=torch.bfloat16), top_k=3)
        wide = build(router.gate.weight.float(), top_k=3)
        x32_TD = x_TD.detach().float().requires_grad_()
        grad_TK = draw(T, 3, seed=2, dtype=torch.float32)
        router(x_TD).topk_scores_TK.backward(grad_TK)
        wide(x32_TD).topk_scores_TK.backward(grad_TK)
        for narrow, exact in ((x_TD, x32_TD), (router.gate.weight, wide.gate.weight)):
            assert narrow.grad is not None
            assert exact.grad is not None
            assert torch.equal(narrow.grad, exact.grad.bfloat16())

    def test_a_wide_bias_does_not_widen_the_scores(self) -> None:
        routing = build(draw(E, D, dtype=torch.float32), top_k=2)(
            draw(T, D, dtype=torch.float32), draw(E, seed=1)
        )
        assert routing.topk_scores_TK.dtype == torch.float32


class TestBias:
    @pytest.mark.parametrize("route_norm", [False, True])
    def test_only_selects(self, route_norm: bool) -> None:
        """A bias that leaves the choice alone leaves scores and gradients alone, to the bit."""
        router = build(draw(E, D) / 4, top_k=3, route_norm=route_norm)
        x_TD = draw(T, D, seed=1).requires_grad_()
        results = []
        for bias_E in (None, torch.full((E,), 7.0, dtype=torch.float64)):
            router.zero_grad()
            routing = router(x_TD, bias_E)
            (x_grad,) = torch.autograd.grad(routing.topk_scores_TK.square().sum(), x_TD)
            assert routing.present_TK is None
            results.append((*routing[:3], x_grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_moves_the_choice(self) -> None:
        router, x_TD = build(draw(E, D) / 4, top_k=3), draw(T, D, seed=1)
        bias_E = torch.zeros(E).double()
        bias_E[[6, 2, 5]] = torch.tensor([30.0, 20.0, 10.0]).double()
        routing = router(x_TD, bias_E)
        assert routing.topk_expert_ids_TK.tolist() == [[6, 2, 5]] * T
        unbiased_TE = F.linear(x_TD, router.gate.weight).sigmoid()
        assert torch.equal(routing.topk_scores_TK, unbiased_TE[:, [6, 2, 5]])

    def test_gets_no_gradient(self) -> None:
        bias_E = draw(E, seed=3).requires_grad_()
        routing = build(draw(E, D), top_k=3)(draw(T, D), bias_E)
        routing.topk_scores_TK.sum().backward()
        assert bias_E.grad is None


def assert_valid(routing: Routing, top_k: int, num_experts: int) -> None:
    """K different ids in range per row, and counts that fit them."""
    ids_TK = routing.topk_expert_ids_TK
    assert ids_TK.dtype == torch.int64
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())
    assert all(0 <= e < num_experts for row in ids_TK.tolist() for e in row)
    assert routing.num_tokens_per_expert_E.dtype == torch.int64
    assert torch.equal(routing.num_tokens_per_expert_E, ids_TK.flatten().bincount(minlength=num_experts))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
class TestDistinct:
    def test_for_any_scores(self, score_func: str, selection: str) -> None:
        """Random, constant, saturated, infinite and half-constant ones, over many seeds and dtypes."""
        options = SELECTIONS[selection]
        for seed, dtype in itertools.product(range(20), (torch.float32, torch.bfloat16)):
            gate_ED = draw(E, D, seed=seed, dtype=dtype)
            x_TD = draw(T, D, seed=seed + 100, dtype=dtype)
            x_TD[0] = 0  # all scores equal
            x_TD[1] *= 1e4  # sigmoid at exactly 0 and 1, softmax underflows
            x_TD[2] = float("inf")  # infinite logits of both signs, or NaN
            gate_ED[: seed % E] = gate_ED[0]
            assert_valid(build(gate_ED, score_func=score_func, **options)(x_TD), options["top_k"], E)

    def test_with_a_nan_token(self, score_func: str, selection: str) -> None:
        """The token is lost, its neighbours are not, and no collective gets wrong splits."""
        options = SELECTIONS[selection]
        router = build(draw(E, D), score_func=score_func, **options)
        x_TD = draw(T, D, seed=1)
        healthy = router(x_TD)
        x_TD[4] = float("nan")
        routing = router(x_TD)
        assert_valid(routing, options["top_k"], E)
        others = [t for t in range(T) if t != 4]
        assert torch.equal(routing.topk_expert_ids_TK[others], healthy.topk_expert_ids_TK[others])
        assert torch.equal(routing.topk_scores_TK[others], healthy.topk_scores_TK[others])

    def test_with_a_nan_bias(self, score_func: str, selection: str) -> None:
        options = SELECTIONS[selection]
        bias_E = draw(E, seed=3)
        bias_E[2] = float("nan")
        router = build(draw(E, D), score_func=score_func, **options)
        assert_valid(router(draw(T, D, seed=1), bias_E), options["top_k"], E)


def test_distinctness_check_notices() -> None:
    ids_TK = torch.tensor([[0, 1], [2, 2]])
    routing = Routing(torch.rand(2, 2), ids_TK, ids_TK.flatten().bincount(minlength=E))
    with pytest.raises(AssertionError):
        assert_valid(routing, 2, E)


class TestCounts:
    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_equal_bincount(self, selection: str) -> None:
        options = SELECTIONS[selection]
        assert_valid(build(draw(E, D), **options)(draw(200, D, seed=1)), options["top_k"], E)

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_no_tokens(self, selection: str) -> None:
        options = SELECTIONS[selection]
        x_TD = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
        router = build(draw(E, D), **options)
        routing = router(x_TD, draw(E, seed=3))
        assert routing.topk_expert_ids_TK.shape == routing.topk_scores_TK.shape == (0, options["top_k"])
        assert routing.num_tokens_per_expert_E.tolist() == [0] * E
        routing.topk_scores_TK.sum().backward()
        assert router.gate.weight.grad is not None
        assert not router.gate.weight.grad.any()


class TestForcedLoadBalance:
    @pytest.mark.parametrize("top_k", [1, 3, E])
    def test_equal_counts_and_live_scores(self, top_k: int) -> None:
        router = build(draw(E, D), top_k=top_k, _debug_force_load_balance=True)
        x_TD = draw(2 * E, D, seed=1)
        routing = router(x_TD, 100 * draw(E, seed=3))
        assert_valid(routing, top_k, E)
        assert routing.num_tokens_per_expert_E.tolist() == [2 * top_k] * E
        live_TE = F.linear(x_TD, router.gate.weight).sigmoid()
        assert torch.equal(routing.topk_scores_TK, live_TE.gather(1, routing.topk_expert_ids_TK))
        routing.topk_scores_TK.sum().backward()
        assert router.gate.weight.grad is not None
        assert router.gate.weight.grad.any(1).all(), "every expert is used, so every row learns"

    def test_uneven_number_of_tokens(self) -> None:
        routing = build(draw(E, D), top_k=3, _debug_force_load_balance=True)(draw(7, D))
        assert_valid(routing, 3, E)
        assert routing.num_tokens_per_expert_E.tolist() == [3] * 5 + [2] * 3


def test_gate_bias_takes_part() -> None:
    """torchtitan's GPT-OSS gate has one: it shifts the logits, unlike the expert bias."""
    router = TokenChoiceTopKRouter.Config(
        num_experts=E, gate=Linear.Config(in_features=D, out_features=E, bias=True), top_k=2
    ).build()
    weight_ED, bias_E, x_TD = draw(E, D), draw(E, seed=2), draw(T, D, seed=1)
    router.gate.weight, router.gate.bias = torch.nn.Parameter(weight_ED), torch.nn.Parameter(bias_E)
    routing = router(x_TD)
    scores_TE = (x_TD @ weight_ED.T + bias_E).sigmoid()
    torch.testing.assert_close(
        routing.topk_scores_TK, scores_TE.sort(1, descending=True).values[:, :2], rtol=1e-12, atol=0
    )
    routing.topk_scores_TK.sum().backward()
    assert router.gate.bias.grad is not None
    assert router.gate.bias.grad.any()


class _Drifting(torch.nn.Module):
    """A block whose recomputation sees slightly other activations, as a non-deterministic kernel gives."""

    def __init__(self, router: torch.nn.Module, drift_TD: Tensor) -> None:
        super().__init__()
        self.router, self.drift_TD, self.forwards = router, drift_TD, 0

    def forward(self, x_TD: Tensor) -> Tensor:
        self.forwards += 1
        return self.router(x_TD + self.drift_TD * (self.forwards > 1)).topk_scores_TK


@pytest.mark.parametrize(("selective", "pinned"), [(True, True), (False, False)], ids=["selective", "full"])
def test_selective_checkpointing_recomputes_the_same_routes(selective: bool, pinned: bool) -> None:
    """The splits of the forward's all-to-all must fit; full recomputation follows the drift (the control)."""
    generator = torch.Generator().manual_seed(0)
    gate = Linear.Config(in_features=32, out_features=16, bias=False)
    router = TokenChoiceTopKRouter.Config(num_experts=16, gate=gate, top_k=3).build()
    torch.nn.init.normal_(router.gate.weight, generator=generator)
    routes: list[Tensor] = []
    router.register_forward_hook(lambda _module, _args, out: routes.append(out.topk_expert_ids_TK.clone()))
    block = _Drifting(router, torch.randn(512, 32, generator=generator) * 1e-2)
    kind = SelectiveAC.Config(force_recompute_mm_shapes_by_fqns=[]) if selective else FullAC.Config()
    wrapped = kind.build(dump_folder="")._wrap_block(block)
    x_TD = torch.randn(512, 32, generator=generator).requires_grad_()
    wrapped(x_TD).backward(torch.randn(512, 3, generator=generator))
    assert len(routes) == 2
    assert torch.equal(routes[0], routes[1]) == pinned
