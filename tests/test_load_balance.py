"""Expert counts (once per training forward, whatever is recomputed) and the bias that follows from them."""

import dataclasses
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.deepseek_v3 import model_registry

from tests import layers
from tests.layers import Mesh
from tests.oracle import Case, random_case
from tests.ranks import RankContext, run_ranks
from titan_moe.layer import load_balance
from titan_moe.layer.load_balance import LoadBalancer, attach_load_balancer, count_tokens
from titan_moe.layer.moe import MoE
from titan_moe.models.swap import swap_moe
from titan_moe.trainer.load_report import load_report, load_statistics

RANKS, D, F, E, K = 4, 16, 8, 8, 3
ALONE = SimpleNamespace(dp_cp_enabled=False, tp_enabled=False, ep_enabled=False)


def layer_case(seed: int, batch: int = 2, length: int = 9) -> Case:
    return random_case(seed, batch, length, D, F, E, K)


class Block(nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.moe(x_BLD)


class Model(nn.Module):
    """Blocks where torchtitan's activation checkpointing looks for them."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        blocks = {str(number): Block(layers.build_layer(case)) for number, case in enumerate(cases)}
        self.layers = nn.ModuleDict(blocks)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.layers.values():
            x_BLD = block(x_BLD)
        return x_BLD


CASES = [layer_case(1), layer_case(2)]


def oracle_counts(x_BLD: Tensor) -> list[list[int]]:
    """Per layer, of one forward of Model(CASES)."""
    counts = []
    for case in CASES:
        out = dataclasses.replace(case, params=case.params | {"x_BLD": x_BLD}).run()
        counts.append(out.counts_E.tolist())
        x_BLD = x_BLD + out.out_BLD.detach()
    return counts


def counts(model: nn.Module) -> list[list[int]]:
    return [m.tokens_per_expert_E.tolist() for m in model.modules() if isinstance(m, MoE)]


@pytest.fixture
def _dynamo_cache() -> Iterator[None]:
    """torchtitan's AC switches a global of dynamo off."""
    yield
    torch._C._dynamo.eval_frame._set_lru_cache(True)


def counts_under(ac: str, *, microbatches: int = 2) -> tuple[list[list[int]], list[int]]:
    """What training forwards and backwards count, and how often each layer's forward ran."""
    model = Model(CASES)
    if ac != "none":
        {"full": FullAC, "selective": SelectiveAC}[ac].Config().build(dump_folder="").apply(model)
    runs = [0] * len(CASES)
    for number, moe in enumerate(m for m in model.modules() if isinstance(m, MoE)):

        def ran(*_: Any, number: int = number) -> None:
            runs[number] += 1

        moe.router.register_forward_hook(ran)
    for microbatch in range(microbatches):
        x_BLD = layer_case(10 + microbatch).params["x_BLD"].detach().clone().requires_grad_()
        model(x_BLD).backward(layer_case(20).grad_out_BLD)
        assert x_BLD.grad is not None
    return counts(model), runs


def expected_counts(microbatches: int = 2) -> list[list[int]]:
    each = [oracle_counts(layer_case(10 + m).params["x_BLD"].detach()) for m in range(microbatches)]
    return [torch.tensor(per_layer).sum(0).tolist() for per_layer in zip(*each, strict=True)]


@pytest.mark.usefixtures("_dynamo_cache")
class TestCountsUnderCheckpointing:
    @pytest.mark.parametrize("ac", ["none", "selective", "full"])
    def test_equal_the_oracle(self, ac: str) -> None:
        found, runs = counts_under(ac)
        assert found == expected_counts()
        assert runs == ([2, 2] if ac == "none" else [4, 4]), "with AC the forward must have run again"

    @pytest.mark.parametrize("ac", ["selective", "full"])
    def test_a_counter_that_counts_recomputation_is_noticed(
        self, ac: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(load_balance, "is_recomputing", lambda: False)
        found, _ = counts_under(ac)
        assert found == [[2 * n for n in per_layer] for per_layer in expected_counts()]

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_plain_checkpoint(self, reentrant: bool) -> None:
        """A reentrant checkpoint runs its first forward without grad: that one counts."""
        model, x_BLD = Model(CASES), layer_case(10).params["x_BLD"].detach().clone().requires_grad_()
        checkpoint(model, x_BLD, use_reentrant=reentrant).backward(layer_case(20).grad_out_BLD)
        assert counts(model) == expected_counts(1)


class TestWhatCounts:
    """The training flag decides, not whether there is a gradient."""

    def test_eval_does_not(self) -> None:
        model = Model(CASES).eval()
        model(layer_case(10).params["x_BLD"])
        with torch.no_grad():
            model(layer_case(10).params["x_BLD"])
        assert counts(model) == [[0] * E] * 2

    def test_training_without_grad_does(self) -> None:
        model = Model(CASES)
        with torch.no_grad():
            model(layer_case(10).params["x_BLD"])
        assert counts(model) == expected_counts(1)

    def test_training_resumes_after_eval(self) -> None:
        model = Model(CASES)
        for training in (True, False, True):
            model.train(training)(layer_case(10).params["x_BLD"])
        assert counts(model) == [[2 * n for n in per_layer] for per_layer in expected_counts(1)]

    def test_no_tokens_count_nothing(self) -> None:
        model = Model(CASES)
        model(layer_case(10).params["x_BLD"][:, :0])
        assert counts(model) == [[0] * E] * 2

    def test_counts_are_exact_integers(self) -> None:
        """An fp32 counter stops at 2**24; a cast of the model must not make one of ours."""
        model = Model(CASES).bfloat16()
        count_E = next(m for m in model.modules() if isinstance(m, MoE)).tokens_per_expert_E
        assert count_E.dtype == torch.int64
        count_E.fill_(2**24)
        count_tokens(count_E, torch.ones(E, dtype=torch.int64), training=True)
        assert count_E.tolist() == [2**24 + 1] * E
        stale_E = torch.full((E,), 2.0**24)
        assert torch.equal(stale_E + 1, stale_E), "what fp32 would have done"


def small_moe(coeff: float | None, load: list[int]) -> MoE:
    """A layer of four experts that has counted `load`."""
    case = random_case(1, 1, 3, D, F, 4, 2)
    moe = dataclasses.replace(layers.build_layer(case).config, load_balance_coeff=coeff).build()
    moe.tokens_per_expert_E.copy_(torch.tensor(load))
    return moe


class TestLoadBalancer:
    def test_bias_by_hand(self) -> None:
        """Loads 10, 2, 4, 0 have mean 4; signs -1, +1, 0, +1 have mean 1/4; times 0.1."""
        moe = small_moe(0.1, [10, 2, 4, 0])
        balancer = LoadBalancer([nn.ModuleDict({"moe": moe})], ALONE)
        balancer.step()
        assert moe.expert_bias_E.dtype == torch.float32
        torch.testing.assert_close(moe.expert_bias_E, torch.tensor([-0.125, 0.075, -0.025, 0.075]))
        assert moe.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
        assert balancer.last_load["moe"].tolist() == [10, 2, 4, 0]

    def test_steps_add_up_and_stay_zero_mean(self) -> None:
        moe = small_moe(1e-3, [0, 0, 0, 0])
        balancer = LoadBalancer([nn.ModuleDict({"moe": moe})], ALONE)
        expected_E = torch.zeros(4, dtype=torch.float64)
        for seed in range(50):
            load_E = torch.randint(0, 9, (4,), generator=torch.Generator().manual_seed(seed))
            moe.tokens_per_expert_E.add_(load_E)
            balancer.step()
            sign_E = (load_E.double().mean() - load_E.double()).sign()
            expected_E += 1e-3 * (sign_E - sign_E.mean())
        assert expected_E.abs().max() > 5e-3, "the data must move the bias"
        torch.testing.assert_close(moe.expert_bias_E.double(), expected_E, rtol=0, atol=1e-7)
        assert abs(moe.expert_bias_E.double().sum().item()) < 1e-7

    def test_balance_leaves_the_bias_alone(self) -> None:
        for load in ([0, 0, 0, 0], [7, 7, 7, 7], [2**53] * 4):
            moe = small_moe(0.1, load)
            LoadBalancer([nn.ModuleDict({"moe": moe})], ALONE).step()
            assert moe.expert_bias_E.tolist() == [0.0] * 4

    def test_sign_is_exact_for_large_counts(self) -> None:
        """One token off the mean in 2**40: the quotient in fp32 would not see it."""
        load = [2**40 + 1, 2**40 - 1, 2**40, 2**40]
        moe = small_moe(0.1, load)
        LoadBalancer([nn.ModuleDict({"moe": moe})], ALONE).step()
        torch.testing.assert_close(moe.expert_bias_E, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
        load_E = torch.tensor(load, dtype=torch.float32)
        assert not (load_E.mean() - load_E).any()

    def test_without_coefficient_there_is_no_bias(self) -> None:
        moe = small_moe(None, [10, 2, 4, 0])
        balancer = LoadBalancer([nn.ModuleDict({"moe": moe})], ALONE)
        balancer.step()
        assert moe.expert_bias_E is None
        assert not [name for name in moe.state_dict() if "bias" in name]
        assert moe.tokens_per_expert_E.tolist() == [0, 0, 0, 0]
        assert load_report(balancer)["moe"]["max_over_mean"] == 2.5, "the load is still reported"

    def test_a_stage_without_moe_does_nothing(self) -> None:
        balancer = LoadBalancer([nn.Linear(2, 2)], ALONE)
        balancer.step()
        assert load_report(balancer) == {}

    def test_runs_before_each_optimizer_step(self) -> None:
        model = Model(CASES)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.0)
        attach_load_balancer(optimizer, [model], ALONE)
        for microbatch in range(2):
            model(layer_case(10 + microbatch).params["x_BLD"]).sum().mul(1.0).backward()
        optimizer.step()
        expected = expected_counts(2)
        assert counts(model) == [[0] * E] * 2
        assert [load_E.tolist() for load_E in optimizer.load_balancer.last_load.values()] == expected
        report = load_report(optimizer.load_balancer)
        assert list(report) == ["layers.0.moe", "layers.1.moe"]
        assert report == dict(zip(report, map(load_statistics, expected), strict=True))

    @pytest.mark.usefixtures("_dynamo_cache")
    def test_names_do_not_show_wrappers(self) -> None:
        model = Model(CASES)
        FullAC.Config().build(dump_folder="").apply(model)
        assert "layers.0._checkpoint_wrapped_module.moe" in dict(model.named_modules())
        assert list(LoadBalancer([model], ALONE).layers) == ["layers.0.moe", "layers.1.moe"]

    def test_finds_the_layers_of_all_parts_and_of_mtp(self) -> None:
        """torchtitan 0.3.0's hook looks under `layers` only and leaves MTP blocks unbalanced."""
        config = model_registry("debugmodel", num_mtp_layers=1).model
        assert swap_moe(config, dispatcher="local") == 6
        with torch.device("meta"):
            model = config.build()
        found = LoadBalancer([model], ALONE).layers
        moes = [module for module in model.modules() if isinstance(module, MoE)]
        assert list(found.values()) == moes
        assert len(found) == 6
        assert [fqn for fqn in found if "mtp" in fqn] == ["mtp_layers.0.moe"]


MESHES = [
    *(Mesh(tp=tp, ep=ep) for tp in (1, 2, 4) for ep in (1, 2, 4)),
    *(Mesh(tp=tp, ep=ep, sp=False) for tp, ep in ((2, 1), (2, 4), (4, 2))),
]


def balance_on(
    ctx: RankContext, case: Case, meshes: list[Mesh], groups: slice
) -> dict[str, tuple[Tensor, Tensor]]:
    """Load and bias after one step, by mesh; the global batch is the same on each.

    `groups`: over which of its groups the balancer sums.
    """
    results = {}
    for mesh in meshes:
        dims = layers.parallel_dims(ctx, mesh)
        layer = layers.on_mesh(layers.build_layer(case, "all_to_all"), dims, mesh)
        x_BLD = layers.local_rows(case.params["x_BLD"], ctx.rank // mesh.tp, dims)
        layer(layers.placed(x_BLD, dims, mesh))
        balancer = LoadBalancer([nn.ModuleDict({"moe": layer})], dims)
        balancer.groups = balancer.groups[groups]
        balancer.step()
        results[str(mesh)] = (balancer.last_load["moe"], layer.expert_bias_E)
    return results


class TestOnMeshes:
    """The same global tokens give the same load and bias, to the bit; no mesh divides the sequence."""

    def test_equal_one_rank(self) -> None:
        assert self._wrong(MESHES, slice(None)) == []

    def test_a_missing_sum_is_noticed(self) -> None:
        mesh = Mesh(tp=2, ep=2)
        for groups in (slice(1, None), slice(0, 1)):  # without the data axis; without TP
            assert self._wrong([mesh], groups) == [f"{mesh} on rank {rank}" for rank in range(RANKS)]

    def _wrong(self, meshes: list[Mesh], groups: slice) -> list[str]:
        case = layer_case(3, batch=4, length=7)
        alone = layers.build_layer(case)
        alone(case.params["x_BLD"])
        balancer = LoadBalancer([nn.ModuleDict({"moe": alone})], ALONE)
        balancer.step()
        load_E, bias_E = balancer.last_load["moe"], alone.expert_bias_E
        assert load_E.tolist() == case.run().counts_E.tolist()
        assert bias_E.any()
        results = run_ranks(balance_on, RANKS, case, meshes, groups, timeout_s=120)
        assert [list(result) for result in results] == [list(map(str, meshes))] * RANKS
        return [
            f"{mesh} on rank {rank}"
            for rank, result in enumerate(results)
            for mesh, (load, bias) in result.items()
            if not torch.equal(load, load_E) or not torch.equal(bias, bias_E)
        ]


class TestStatistics:
    def test_by_hand(self) -> None:
        """Mean 3; squared distances 1, 9, 25, 9 have mean 11."""
        assert load_statistics([4, 0, 8, 0]) == {
            "max_over_mean": pytest.approx(8 / 3),
            "cv": pytest.approx(math.sqrt(11) / 3),
            "dead_experts": 2,
        }

    def test_balanced(self) -> None:
        assert load_statistics([5, 5, 5]) == {"max_over_mean": 1.0, "cv": 0.0, "dead_experts": 0}

    def test_no_tokens(self) -> None:
        assert load_statistics([0, 0, 0]) == {"max_over_mean": 0.0, "cv": 0.0, "dead_experts": 3}
