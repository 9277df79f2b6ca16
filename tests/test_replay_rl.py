"""The face for RL trainers: ids of a rollout engine, installed for a microbatch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests import layers
from tests.oracle import random_case
from tests.ranks import RankContext, run_ranks
from tests.test_dispatch import HostReads
from titan_moe.layer.moe import MoE
from titan_moe.replay.check import Gates, ReplayCheckError
from titan_moe.replay.ids import MISSING, ReplayDataError
from titan_moe.replay.regions import Regions
from titan_moe.replay.rl import RolloutReplay
from titan_moe.replay.selectors import Microbatch, ReplaySession, bind_selectors, selectors_of
from titan_moe.replay.trace import Header, TraceWriter

B, L, D, F, E, K = 3, 7, 16, 8, 8, 3
CASES = {number: random_case(number, B, L, D, F, E, K) for number in (1, 2)}


class Block(nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.moe(x_BLD)


class Model(nn.Module):
    """Layer 0 is dense, 1 and 2 are MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {str(number): Block(layers.build_layer(case)) for number, case in CASES.items()}
        self.layers = nn.ModuleDict({"0": nn.Identity(), **blocks})
        bind_selectors(self, Regions())

    def forward(self, x_BLD: Tensor) -> Tensor:
        for block in self.layers.values():
            x_BLD = block(x_BLD)
        return x_BLD


@pytest.fixture
def model() -> Model:
    return Model()


def x_BLD() -> Tensor:
    return CASES[1].params["x_BLD"].detach()


def random_ids(*, missing: float = 0.0) -> Tensor:
    """(B * L, 2, K) int16."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(B * L, 2, E, generator=generator).argsort(-1)[..., :K].to(torch.int16)
    ids[torch.rand(ids.shape, generator=generator) < missing] = MISSING
    return ids


def seen_ids(model: Model) -> dict[int, Tensor]:
    """What reaches the dispatchers, by layer."""
    seen: dict[int, Tensor] = {}
    for number in CASES:
        moe: Any = model.layers[str(number)].moe

        def at_the_door(_module: Any, args: Any, number: int = number) -> None:
            seen[number] = args[1].topk_expert_ids_TK

        moe.routed_experts.register_forward_pre_hook(at_the_door)
    return seen


def install(replay: RolloutReplay, ids: Tensor, **further: Any) -> Any:
    return replay.microbatch(ids, batch_size=B, seq_len=L, **further)


def evidence(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "replay_evidence.jsonl").read_text().splitlines()]


class TestInstalling:
    def test_routes_go_where_they_should_and_the_gate_learns(self, model: Model) -> None:
        seen, ids = seen_ids(model), random_ids()
        with install(RolloutReplay([model]), ids):
            out_BLD = model(x_BLD())
        out_BLD.backward(CASES[1].grad_out_BLD)  # after the context
        for column, number in enumerate(CASES):
            assert torch.equal(seen[number], ids[:, column].long())
            moe: Any = model.layers[str(number)].moe
            assert moe.router.gate.weight.grad.abs().sum() > 0

    def test_outside_the_context_routing_is_live(self, model: Model) -> None:
        live_BLD = Model()(x_BLD())
        replay = RolloutReplay([model])
        with install(replay, random_ids()):
            assert not torch.equal(model(x_BLD()), live_BLD)
        assert torch.equal(model(x_BLD()), live_BLD)
        with pytest.raises(ZeroDivisionError), install(replay, random_ids()):
            raise ZeroDivisionError
        assert torch.equal(model(x_BLD()), live_BLD)

    def test_all_decoder_layers(self, model: Model) -> None:
        """As engines capture them: an entry for the dense layer too."""
        seen, ids = seen_ids(model), random_ids()
        with install(RolloutReplay([model]), torch.cat([torch.full_like(ids[:, :1], 7), ids], dim=1)):
            model(x_BLD())
        assert torch.equal(seen[1], ids[:, 0].long())
        with install(RolloutReplay([model]), ids, columns=[1, 0]):
            model(x_BLD())
        assert torch.equal(seen[1], ids[:, 1].long())

    def test_the_last_row_may_be_missing(self, model: Model) -> None:
        seen, ids = seen_ids(model), random_ids().unflatten(0, (B, L))
        with install(RolloutReplay([model]), ids[:, :-1]):
            model(x_BLD())
        assert torch.equal(seen[1].view(B, L, K)[:, :-1], ids[:, :-1, 0].long())
        assert all(len(set(row)) == K for row in seen[1].tolist())

    def test_padding_is_no_load(self, model: Model) -> None:
        valid_BL = torch.ones(B, L, dtype=torch.bool)
        valid_BL[:, 4:] = False
        ids = random_ids()
        with install(RolloutReplay([model]), ids, valid_BL=valid_BL):
            model(x_BLD())
        moe: Any = model.layers["1"].moe
        counted = ids[:, 0][valid_BL.flatten()].long().flatten()
        assert torch.equal(moe.tokens_per_expert_E, torch.bincount(counted, minlength=E))


class TestRefusals:
    def test_a_model_without_routers_of_ours(self) -> None:
        with pytest.raises(ValueError, match="no router of ours that can replay"):
            RolloutReplay([nn.Linear(2, 2)])

    def test_too_few_layers(self, model: Model) -> None:
        with pytest.raises(ReplayDataError, match=r"has 1 layers, the model has 2 MoE layers"):
            with install(RolloutReplay([model]), random_ids()[:, :1]):
                pass

    def test_another_microbatch(self, model: Model) -> None:
        replay = RolloutReplay([model])
        with pytest.raises(ValueError, match=r"layers.1.moe: the forward has 2 x 7 tokens, 21 are installed"):
            with install(replay, random_ids()):
                model(x_BLD()[:2])

    def test_a_duplicate(self, model: Model) -> None:
        ids = random_ids()
        ids[9, 1, 2] = ids[9, 1, 0]
        with pytest.raises(ReplayDataError, match=r"layers.2.moe, sample 1, token 2: .* same id twice"):
            with install(RolloutReplay([model]), ids):
                pass


def header() -> Header:
    shapes = [slot.shape for slot in selectors_of(Model())]
    return Header(
        model="m",
        layers=Header.layers_of(shapes),
        seq_len=L,
        sequences_per_step=B,
        weights="w",
        first_step=1,
    )


def install_on_rank(ctx: RankContext) -> str:
    """One rank has a duplicate; what each is told."""
    ids = random_ids()
    if ctx.rank == 1:
        ids[9, 1, 2] = ids[9, 1, 0]
    try:
        with install(RolloutReplay([Model()]), ids):
            return "installed"
    except ReplayDataError as error:
        return str(error)


def test_a_duplicate_ends_every_rank() -> None:
    first, second = run_ranks(install_on_rank, 2)
    assert first == f"rank 1: {second}"
    assert second.startswith("layers.2.moe, sample 1, token 2: ")


class TestCost:
    """Neither replaying nor recording reads anything on the host, and a recording keeps copies only."""

    def _reads(self, model: Model) -> list[str]:
        with HostReads().counting() as seen:
            out_BLD = model(x_BLD())
            out_BLD.backward(CASES[1].grad_out_BLD)
        return seen

    @pytest.mark.parametrize("missing", [0.0, 0.3])
    def test_replay(self, model: Model, missing: float) -> None:
        with install(RolloutReplay([model]), random_ids(missing=missing)):
            assert self._reads(model) == []

    def test_record(self, model: Model, tmp_path: Path) -> None:
        writer = TraceWriter(tmp_path, header(), rank=0, num_ranks=1, mesh="")
        routes = ReplaySession(selectors_of(model), observers=(writer,))
        with routes.microbatch(Microbatch(number=0, tokens_P=torch.arange(B * L))):
            assert self._reads(model) == []
        (ids_TK,) = writer._parts["layers.1.moe#0"]
        assert ids_TK.dtype == torch.int8
        assert ids_TK.untyped_storage().nbytes() == B * L * K

    def test_a_read_is_noticed(self, model: Model) -> None:
        moe: Any = model.layers["1"].moe
        source = moe.router.selector
        moe.router.selector = lambda query: (query.ranking().max().item(), source(query))[1]
        assert len(self._reads(model)) == 1


class TestCheck:
    def _replay(self, model: Model, folder: Path, **gates: float) -> RolloutReplay:
        return RolloutReplay([model], check=Gates(**gates), evidence_folder=folder)

    def test_evidence_of_live_routes(self, model: Model, tmp_path: Path) -> None:
        seen = seen_ids(model)
        model(x_BLD())
        ids = torch.stack([seen[number] for number in CASES], dim=1)
        ids[5, 0, 1] = MISSING
        valid_BL = torch.ones(B, L, dtype=torch.bool)
        valid_BL[2, 5:] = False
        replay = self._replay(model, tmp_path)
        for _ in range(2):
            with install(replay, ids, valid_BL=valid_BL):
                model(x_BLD()).backward(CASES[1].grad_out_BLD)
        summary = replay.end_step(1)
        assert summary is not None
        assert summary.startswith("replay fwd=4/4 bwd=4/4 missing=0 filled=2 mismatch=0")
        first, second = (
            json.loads(line) for line in (tmp_path / "replay_evidence.jsonl").read_text().splitlines()
        )
        assert (first["layer"], second["layer"]) == ("layers.1.moe", "layers.2.moe")
        assert (first["fwd"], first["bwd"], first["tokens"], first["padding"], first["filled"]) == (
            2,
            2,
            42,
            4,
            2,
        )
        assert first["used"] == second["used"] == second["mean_overlap"] == second["lift"] == 1.0
        assert first["used_ids"] == first["installed_ids"] != second["used_ids"]

    def test_random_routes_break_the_gate(self, model: Model, tmp_path: Path) -> None:
        replay = self._replay(model, tmp_path)
        with install(replay, random_ids()):
            model(x_BLD()).backward(CASES[1].grad_out_BLD)
        with pytest.raises(ReplayCheckError, match=r"step 3: .* share no expert with the live router"):
            replay.end_step(3)

    def test_a_forward_without_its_backward(self, model: Model, tmp_path: Path) -> None:
        replay = self._replay(model, tmp_path, max_zero_overlap=1.0)
        with install(replay, random_ids()):
            model(x_BLD())
        with pytest.raises(ReplayCheckError, match=r"replayed in 0 of 1 microbatches \(bwd\)"):
            replay.end_step(1)

    def test_a_step_without_a_forward(self, model: Model, tmp_path: Path) -> None:
        with pytest.raises(ReplayCheckError, match="no token was checked on any rank"):
            self._replay(model, tmp_path).end_step(1)

    def test_near_ties_and_suspicious_flips(self, model: Model, tmp_path: Path) -> None:
        """Every flip is one of them. A gate of zeros ties all experts, the other layer's does not."""
        tied: Any = model.layers["1"].moe
        tied.router.gate.weight.data.zero_()
        tied.expert_bias_E.zero_()
        replay = self._replay(model, tmp_path, max_zero_overlap=1.0)
        with install(replay, random_ids()):
            model(x_BLD()).backward(CASES[1].grad_out_BLD)
        replay.end_step(1)
        for line in evidence(tmp_path):
            flips = line["near_tie_flips"] + line["suspicious_flips"]
            assert flips == round((1 - line["exact_set"]) * line["tokens"])
            assert (line["suspicious_flips"] == 0) == (line["layer"] == "layers.1.moe")
            assert flips > 0


class TestNothingIsSilent:
    """What would leave a replay undone must raise, or fail the check."""

    def test_a_second_forward_in_a_microbatch(self, model: Model) -> None:
        with install(RolloutReplay([model]), random_ids()):
            model(x_BLD())
            with pytest.raises(RuntimeError, match=r"layers.1.moe: call 1 in one microbatch"):
                model(x_BLD())

    def test_a_recomputation_after_the_context(self, model: Model) -> None:
        with install(RolloutReplay([model]), random_ids()):
            out_BLD = checkpoint(model, x_BLD().requires_grad_(), use_reentrant=False)
        with pytest.raises(RuntimeError, match=r"a recomputation outside of a region would route live"):
            out_BLD.backward(CASES[1].grad_out_BLD)

    def test_more_layers_than_the_decoder_has(self, model: Model) -> None:
        ids = random_ids()
        with pytest.raises(ReplayDataError, match=r"has 5 layers, .* and 3 decoder layers; say with columns"):
            with install(RolloutReplay([model]), torch.cat([ids, ids, ids[:, :1]], dim=1)):
                pass

    def test_two_replays_of_one_model(self, model: Model) -> None:
        seen, ids = seen_ids(model), random_ids()
        first, second = RolloutReplay([model]), RolloutReplay([model])
        for replay in (first, second, first):
            with install(replay, ids):
                model(x_BLD())
            assert torch.equal(seen[1], ids[:, 0].long())
            seen.clear()

    def test_filled_picks_are_no_agreement(self, model: Model, tmp_path: Path) -> None:
        """One token has ids, and they are the worst; all other rows are filled by the live router."""
        replay = RolloutReplay([model], check=Gates(), evidence_folder=tmp_path)
        seen = seen_ids(model)
        model(x_BLD())
        ids = torch.full((B * L, 2, K), MISSING)
        for column, number in enumerate(CASES):
            ids[4, column] = torch.tensor([e for e in range(E) if e not in seen[number][4].tolist()][:K])
        valid_BL = torch.zeros(B, L, dtype=torch.bool)
        valid_BL[0, 4] = True
        with install(replay, ids, valid_BL=valid_BL):
            model(x_BLD()).backward(CASES[1].grad_out_BLD)
        with pytest.raises(ReplayCheckError, match=r"layers.1.moe: 100.00% of .* first is token 4"):
            replay.end_step(1)
        (line, _) = evidence(tmp_path)
        assert (line["zero_overlap"], line["mean_overlap"], line["exact_set"]) == (1.0, 0.0, 0.0)

    def test_one_wrong_layer_does_not_hide(self, model: Model, tmp_path: Path) -> None:
        replay = RolloutReplay([model], check=Gates(max_zero_overlap=0.05), evidence_folder=tmp_path)
        seen = seen_ids(model)
        model(x_BLD())
        ids = torch.stack([seen[1], (seen[2] + 3) % E], dim=1)
        with install(replay, ids):
            model(x_BLD()).backward(CASES[1].grad_out_BLD)
        with pytest.raises(ReplayCheckError, match=r"step 1: layers.2.moe: .* share no expert"):
            replay.end_step(1)

    def test_a_forward_without_gradients_owes_no_backward(self, model: Model, tmp_path: Path) -> None:
        replay = RolloutReplay([model], check=Gates(max_zero_overlap=1.0), evidence_folder=tmp_path)
        with torch.no_grad(), install(replay, random_ids()):
            model(x_BLD())
        summary = replay.end_step(1)
        assert summary is not None
        assert summary.startswith("replay fwd=2/2 bwd=0/0 missing=0")

    def test_an_exception_begins_the_step_anew(self, model: Model, tmp_path: Path) -> None:
        replay = RolloutReplay([model], check=Gates(max_zero_overlap=1.0), evidence_folder=tmp_path)
        with pytest.raises(ValueError, match="1 x 7 tokens"), install(replay, random_ids()):
            model(x_BLD()[:1])
        with install(replay, random_ids()):
            model(x_BLD()).backward(CASES[1].grad_out_BLD)
        summary = replay.end_step(1)
        assert summary is not None
        assert summary.startswith("replay fwd=2/2 bwd=2/2")


def wrong_type_on_rank(ctx: RankContext) -> str:
    ids: Any = random_ids() if ctx.rank == 0 else [[1, 2]]
    try:
        with install(RolloutReplay([Model()]), ids):
            return "installed"
    except ReplayDataError as error:
        return str(error)


def test_an_odd_argument_ends_every_rank() -> None:
    first, second = run_ranks(wrong_type_on_rank, 2)
    assert second == "routed_experts must be a tensor of 3 or 4 dims"
    assert first == f"rank 1: {second}"
