"""Recomputation routes as its forward did; slots find their ids by layer, call, microbatch and token."""

import dataclasses
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models.deepseek_v3 import model_registry

from tests import layers
from tests.layers import Mesh
from tests.oracle import MODULE_FQNS, Case
from tests.ranks import Mode, RankContext, run_ranks
from tests.test_load_balance import ALONE, CASES, Block, Model, counts, layer_case
from titan_moe.layer.dispatch.base import Routing
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.load_balance import LoadBalancer
from titan_moe.layer.moe import MoE
from titan_moe.layer.router import Query, Selection, TokenChoiceTopKRouter
from titan_moe.models.swap import swap_moe
from titan_moe.parallel.parallelize import parallelize
from titan_moe.replay import regions as regions_module
from titan_moe.replay import selectors as selectors_module
from titan_moe.replay.regions import Region, Regions
from titan_moe.replay.selectors import (
    Installed,
    Microbatch,
    ReplaySelector,
    ReplaySession,
    bind_selectors,
    selectors_of,
)

D, E, K = 16, 8, 3
LAYERS = ["layers.0.moe", "layers.1.moe"]
aten: Any = torch.ops.aten


class RecomputedTopK(SelectiveAC):
    """Without torchtitan's own remedy: its saved topk keeps the choice as long as nothing else runs."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        return super().get_save_ops() - {aten.topk.default}


class SavedCasts(SelectiveAC):
    """Saves every _to_copy, as torchtitan's policy does with those from CUDA to the host."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        return super().get_save_ops() | {aten._to_copy.default}


AC: dict[str, Any] = {
    "full": FullAC,
    "selective": SelectiveAC,
    "selective-topk": RecomputedTopK,
    "selective+casts": SavedCasts,
}


@pytest.fixture(autouse=True)
def _dynamo_cache() -> Iterator[None]:
    """torchtitan's AC switches a global of dynamo off."""
    yield
    torch._C._dynamo.eval_frame._set_lru_cache(True)


class Bound(NamedTuple):
    """A model as `parallelize` leaves it, on one rank."""

    model: nn.Module
    regions: Regions
    slots: list[ReplaySelector]


def bound(model: nn.Module, ac: str = "none", *, pinned: bool = True) -> Bound:
    """The last steps of `parallelize`."""
    if ac != "none":
        AC[ac].Config().build(dump_folder="").apply(model)
    regions = Regions()
    slots = bind_selectors(model, regions)
    if pinned:
        regions.pin(model)
    return Bound(model, regions, slots)


def model_of(*blocks: nn.Module) -> Model:
    """These blocks, one after the other."""
    model = Model([])
    model.layers.update({str(number): block for number, block in enumerate(blocks)})
    return model


class Twice(Block):
    """Calls its layer twice, with other tokens."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.moe(self.moe(x_BLD) - x_BLD)


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def move_selection(model: nn.Module, seed: int) -> None:
    """Other experts from now on, by a bias that enters no score: only ids can tell."""
    generator = torch.Generator().manual_seed(seed)
    for moe in moes(model):
        moe.expert_bias_E.copy_(torch.randn(E, generator=generator))


def move_gates(model: nn.Module, seed: int) -> None:
    """Other scores from now on, behind autograd's back, by enough to flip many choices."""
    generator = torch.Generator().manual_seed(seed)
    for moe in moes(model):
        weight = moe.router.gate.weight.data
        weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype))


def tokens(number: int, length: int = 9) -> Tensor:
    return layer_case(10 + number, length=length).params["x_BLD"].detach().clone().requires_grad_()


def out_gradient(number: int, length: int = 9) -> Tensor:
    return layer_case(30 + number, length=length).grad_out_BLD


def take_gradients(model: nn.Module, x_BLD: Tensor) -> dict[str, Tensor]:
    """All gradients, by name without wrappers; the parameters' start anew."""
    named = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    named["x_BLD"] = x_BLD.grad
    for parameter in model.parameters():
        parameter.grad = None
    assert all(gradient is not None for gradient in named.values())
    return named


def no_context(_number: int) -> AbstractContextManager[Any]:
    return nullcontext()


def run(
    model: nn.Module,
    schedule: str,
    *,
    forward_in: Callable[[int], AbstractContextManager[Any]] = no_context,
    length: int = 9,
) -> list[dict[str, Tensor]]:
    """Gradients of each microbatch, by its number; `F1` and `B1` are its forward and backward.

    Each forward would choose other experts than the one before, and each recomputation others again.
    """
    out: dict[int, tuple[Tensor, Tensor]] = {}
    found: dict[int, dict[str, Tensor]] = {}
    for action in schedule.split():
        number = int(action[1:])
        if action[0] == "F":
            move_selection(model, number)
            x_BLD = tokens(number, length)
            with forward_in(number):
                out[number] = (x_BLD, model(x_BLD))
        else:
            move_selection(model, 100 + number)
            x_BLD, out_BLD = out.pop(number)
            out_BLD.backward(out_gradient(number, length))
            found[number] = take_gradients(model, x_BLD)
    return [found[number] for number in sorted(found)]


def alone(model: nn.Module, microbatches: int = 1, **options: Any) -> list[dict[str, Tensor]]:
    """What `run` must find: each microbatch by itself. For a model without checkpoints."""
    assert not [module for module in model.modules() if isinstance(module, CheckpointWrapper)]
    return run(model, " ".join(f"F{number} B{number}" for number in range(microbatches)), **options)


def differing(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> list[str]:
    """Names of the gradients that are not equal to the bit, with their microbatch."""
    assert [one.keys() for one in found] == [one.keys() for one in expected]
    return [
        f"{name} of {number}"
        for number, one in enumerate(expected)
        for name, gradient in one.items()
        if not torch.equal(found[number][name], gradient)
    ]


def watch(model: nn.Module) -> dict[str, list[Routing]]:
    """What arrives at the dispatcher of each layer from now on, recomputations included."""
    seen: dict[str, list[Routing]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            calls = seen.setdefault(name.replace("_checkpoint_wrapped_module.", ""), [])
            module.routed_experts.register_forward_pre_hook(
                lambda _module, args, calls=calls: calls.append(args[1])
            )
    return seen


def ids_of(seen: list[Routing]) -> list[list[list[int]]]:
    return [routing.topk_expert_ids_TK.tolist() for routing in seen]


def in_thread(action: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(action).result(timeout=60)


class TestRecomputation:
    """Full AC recomputes everything, SAC what it has not saved: on the routes of the forward, both."""

    @pytest.mark.parametrize("ac", ["full", "selective", "selective-topk"])
    def test_another_selection_changes_nothing(self, ac: str) -> None:
        assert differing(run(bound(Model(CASES), ac).model, "F0 B0"), alone(Model(CASES))) == []

    @pytest.mark.parametrize("ac", ["full", "selective-topk"])
    def test_without_a_pin_the_gradients_are_wrong_and_nothing_is_raised(self, ac: str) -> None:
        found = run(bound(Model(CASES), ac, pinned=False).model, "F0 B0")
        assert len(differing(found, alone(Model(CASES)))) > 4

    @pytest.mark.parametrize("ac", ["full", "selective", "selective-topk"])
    def test_a_moved_gate_gives_the_gradients_of_the_unmoved_ids(self, ac: str) -> None:
        assert self._errors(ac) == []

    @pytest.mark.parametrize("ac", ["full", "selective-topk"])
    def test_a_moved_gate_without_a_pin_does_not(self, ac: str) -> None:
        assert "layers.1.moe.router.gate.weight" in self._errors(ac, pinned=False)

    def _errors(self, ac: str, *, pinned: bool = True) -> list[str]:
        """Where the gradients after a moved gate are not the oracle's."""
        model = bound(Model(CASES), ac, pinned=pinned).model
        x_BLD = tokens(0)
        out_BLD = model(x_BLD)
        move_gates(model, 1)
        out_BLD.backward(out_gradient(0))
        found = take_gradients(model, x_BLD)
        gates = [moe.router.gate.weight.detach() for moe in moes(model)]
        expected = oracle_gradients(tokens(0).detach(), gates)
        assert found.keys() == expected.keys()
        return [
            name
            for name, gradient in expected.items()
            if not (found[name] - gradient).abs().max() <= 1e-12 * gradient.abs().max()
        ]

    def test_pin_counts_and_keeps_other_arguments(self) -> None:
        model = Model(CASES)
        AC["selective"].Config(preserve_rng_state=False).build(dump_folder="").apply(model)
        before = [module.checkpoint_fn.keywords for module in model.modules() if _is_wrapper(module)]
        assert Regions().pin(model) == 2
        after = [module.checkpoint_fn.keywords for module in model.modules() if _is_wrapper(module)]
        for old, new in zip(before, after, strict=True):
            assert old.pop("context_fn") is not new.pop("context_fn")
            assert old == new
            assert new["preserve_rng_state"] is False
        assert Regions().pin(Model(CASES)) == 0

    def test_a_wrapper_with_debug_is_left_alone(self) -> None:
        """torch refuses its switch together with contexts: the other choice is a model that does not run."""
        model = Model(CASES)
        AC["full"].Config(debug=True).build(dump_folder="").apply(model)
        built = bound(model, pinned=False)
        assert built.regions.pin(model) == 0
        built.model(tokens(0)).backward(out_gradient(0))

    def test_contexts_that_were_there_are_entered_too(self) -> None:
        """SAC lives in them: without, it would silently become full AC."""
        entered: list[str] = []

        @contextmanager
        def note(name: str) -> Iterator[None]:
            entered.append(name)
            yield
            entered.append(f"{name} done")

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return note("forward"), note("recomputation")

        block = Block(layers.build_layer(CASES[0]))
        built = bound(model_of(checkpoint_wrapper(block, context_fn=contexts, early_stop=False)))
        run(built.model, "F0 B0")
        assert entered == ["forward", "forward done", "recomputation", "recomputation done"]

    def test_a_pin_on_top_of_a_pin(self) -> None:
        built = bound(Model(CASES), "full")
        built.regions.pin(built.model)
        assert differing(run(built.model, "F0 F1 B0 B1"), alone(Model(CASES), 2)) == []

    def test_plain_checkpoint_with_our_contexts(self) -> None:
        built = bound(Model(CASES))

        def forward(x_BLD: Tensor) -> Tensor:
            return checkpoint(built.model, x_BLD, use_reentrant=False, context_fn=built.regions.contexts)

        wrapped = Calls(built.model, forward)
        found = run(wrapped, "F0 F1 B1 B0")
        renamed = [{name.removeprefix("model."): g for name, g in one.items()} for one in found]
        assert differing(renamed, alone(Model(CASES), 2)) == []


class Calls(nn.Module):
    """A model behind a function that runs it."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.function(x_BLD)


def _is_wrapper(module: nn.Module) -> bool:
    return isinstance(module, CheckpointWrapper)


def with_input(case: Case, x_BLD: Tensor, **further: Tensor) -> Case:
    leaves = {name: t.detach().clone().requires_grad_() for name, t in {"x_BLD": x_BLD, **further}.items()}
    return dataclasses.replace(case, params=case.params | leaves)


def oracle_gradients(x_BLD: Tensor, gates: list[Tensor]) -> dict[str, Tensor]:
    """Model(CASES) where each block's backward has another gate than its forward.

    The input and the ids of a block are those of the forward, the scores those of the gate given here.
    """
    forwards = []
    for case in CASES:
        out = with_input(case, x_BLD).run()
        forwards.append((x_BLD, out.topk_ids_TK))
        x_BLD = x_BLD + out.out_BLD.detach()
    gradient, found = out_gradient(0), {}
    for number in (1, 0):
        x_BLD, ids_TK = forwards[number]
        case = with_input(CASES[number], x_BLD, gate_ED=gates[number])
        _, own = dataclasses.replace(case, grad_out_BLD=gradient).run_with_gradients(ids_TK)
        gradient = gradient + own["x_BLD"]
        found |= {f"layers.{number}.moe.{MODULE_FQNS[n]}": g for n, g in own.items() if n in MODULE_FQNS}
    return found | {"x_BLD": gradient}


SCHEDULES = {
    "reversed": "F0 F1 F2 F3 B3 B2 B1 B0",
    "in order": "F0 F1 F2 F3 B0 B1 B2 B3",
    "mixed": "F0 F1 F2 F3 B2 B0 B3 B1",
    "interleaved": "F0 F1 B0 F2 B2 F3 B1 B3",
    "one by one": "F0 B0 F1 B1 F2 B2 F3 B3",
}


class TestOrder:
    """Microbatches in flight have the same shapes here: mistaken routes would not be noticed otherwise."""

    @pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
    @pytest.mark.parametrize("ac", ["full", "selective"])
    def test_of_backwards_does_not_matter(self, ac: str, schedule: str) -> None:
        assert differing(run(bound(Model(CASES), ac).model, schedule), alone(Model(CASES), 4)) == []

    def test_routes_of_another_microbatch_would_be_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Regions that forget which forward is whose: a queue per layer, as in a cursor design."""
        queue: dict[str, list[Selection]] = {}

        def choose(regions: Regions, name: str, choose: Callable[[], Selection]) -> Selection:
            if not regions.recomputing:
                queue.setdefault(name, []).append(choose())
                return queue[name][-1]
            return queue[name].pop(0)

        monkeypatch.setattr(Regions, "choose", choose)
        expected = alone(Model(CASES), 4)
        assert differing(run(bound(Model(CASES), "full").model, SCHEDULES["in order"]), expected) == []
        assert differing(run(bound(Model(CASES), "full").model, SCHEDULES["reversed"]), expected) != []

    def test_backward_in_another_thread(self) -> None:
        built = bound(Model(CASES), "full")
        move_selection(built.model, 0)
        x_BLD = tokens(0)
        out_BLD = built.model(x_BLD)
        move_selection(built.model, 1)
        in_thread(lambda: out_BLD.backward(out_gradient(0)))
        assert differing([take_gradients(built.model, x_BLD)], alone(Model(CASES))) == []

    def test_forward_in_another_thread(self) -> None:
        built = bound(Model(CASES), "full")
        assert differing(in_thread(lambda: run(built.model, "F0 B0")), alone(Model(CASES))) == []
        assert built.regions.stack == []

    def test_a_forward_in_the_middle_of_a_recomputation(self) -> None:
        """DualPipeV's overlapped pair: two threads, one model."""
        built, main = bound(Model(CASES), "full"), threading.current_thread()
        inside, go_on = threading.Event(), threading.Event()

        def stop(*_: Any) -> None:
            if threading.current_thread() is not main:
                inside.set()
                assert go_on.wait(60)

        states: list[bool] = []
        move_selection(built.model, 0)
        x0_BLD, x1_BLD = tokens(0), tokens(1)
        out0_BLD = built.model(x0_BLD)
        moes(built.model)[1].register_forward_pre_hook(stop)
        moes(built.model)[1].register_forward_hook(lambda *_: states.append(built.regions.recomputing))
        with ThreadPoolExecutor(1) as pool:
            backward = pool.submit(out0_BLD.backward, out_gradient(0))
            try:
                assert inside.wait(60)
                move_selection(built.model, 1)
                out1_BLD = built.model(x1_BLD)
                assert (states, built.regions.recomputing) == ([False], False)
            finally:
                go_on.set()
            backward.result(timeout=60)
        assert states == [False, True]
        found = [take_gradients(built.model, x0_BLD)]
        move_selection(built.model, 2)
        out1_BLD.backward(out_gradient(1))
        found.append(take_gradients(built.model, x1_BLD))
        assert differing(found, alone(Model(CASES), 2)) == []


SHARED: dict[str, Callable[[], Model]] = {
    "one checkpoint": lambda: model_of(Twice(layers.build_layer(CASES[0]))),
    "two checkpoints": lambda: model_of(*map(Block, [layers.build_layer(CASES[0])] * 2)),
}


class TestCalls:
    """A layer that runs more than once per forward, or per recomputation."""

    @pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
    @pytest.mark.parametrize("ac", ["full", "selective"])
    def test_a_shared_layer(self, ac: str, build: Callable[[], Model]) -> None:
        built = bound(build(), ac)
        assert [slot.layer for slot in built.slots] == ["layers.0.moe"]
        assert differing(run(built.model, "F0 F1 B1 B0"), alone(build(), 2)) == []

    @pytest.mark.parametrize("build", SHARED.values(), ids=SHARED)
    def test_its_calls_choose_different_experts(self, build: Callable[[], Model]) -> None:
        """What makes the test above one of calls; and how the recomputation takes them."""
        built = bound(build(), "full")
        seen = watch(built.model)["layers.0.moe"]
        run(built.model, "F0 B0")
        first, second, *recomputed = ids_of(seen)
        assert first != second
        assert recomputed == ([first, second] if len(built.model.layers) == 1 else [second, first])

    @pytest.mark.parametrize("early_stop", [False, True])
    @pytest.mark.parametrize("inner", ["full", "selective"])
    def test_a_checkpoint_in_a_checkpoint(self, inner: str, early_stop: bool) -> None:
        model = Model(CASES)
        AC[inner].Config().build(dump_folder="").apply(model)
        built = bound(checkpoint_wrapper(model, early_stop=early_stop))
        seen = watch(built.model)
        assert differing(run(built.model, "F0 F1 B1 B0"), alone(Model(CASES), 2)) == []
        assert len(seen["layers.0.moe"]) == 6, "two forwards, and two recomputations of each"

    def test_a_checkpoint_around_plain_modules(self) -> None:
        built = bound(checkpoint_wrapper(Model(CASES), early_stop=True))
        assert differing(run(built.model, "F0 F1 B1 B0"), alone(Model(CASES), 2)) == []

    def test_a_gradient_taken_inside_of_a_checkpoint(self) -> None:
        """Its forward holds a forward, a backward and so a recomputation; its recomputation all of them."""

        class Steep(nn.Module):
            def __init__(self, block: nn.Module) -> None:
                super().__init__()
                self.block = block

            def forward(self, x_BLD: Tensor) -> Tensor:
                leaf_BLD = x_BLD.detach().requires_grad_()
                (slope_BLD,) = torch.autograd.grad(self.block(leaf_BLD).square().sum(), leaf_BLD)
                move_selection(self, 50)
                return self.block(x_BLD + 0.1 * slope_BLD)

        def build(wrap: Callable[[nn.Module], nn.Module]) -> Model:
            return model_of(*(wrap(Steep(wrap(Block(layers.build_layer(case))))) for case in CASES))

        built = bound(build(partial(checkpoint_wrapper, early_stop=False)))
        assert differing(run(built.model, "F0 F1 B1 B0"), alone(build(lambda block: block), 2)) == []

    @pytest.mark.parametrize("early_stop", [False, True])
    def test_recomputed_again_for_a_second_backward(self, early_stop: bool) -> None:
        blocks = [checkpoint_wrapper(block, early_stop=early_stop) for block in Model(CASES).layers.values()]
        built = bound(model_of(*blocks))
        seen = watch(built.model)
        move_selection(built.model, 0)
        x_BLD, found = tokens(0), []
        out_BLD = built.model(x_BLD)
        for backward in range(3):
            move_selection(built.model, 1 + backward)
            out_BLD.backward(out_gradient(0), retain_graph=True)
            found.append(take_gradients(built.model, x_BLD))
            x_BLD.grad = None
        assert len(seen["layers.1.moe"]) == 4
        assert differing(found, alone(Model(CASES)) * 3) == []

    def test_a_recomputation_that_calls_more_often_is_refused(self) -> None:
        class Greedy(Block):
            again = False

            def forward(self, x_BLD: Tensor) -> Tensor:
                if self.again:
                    with torch.no_grad():
                        self.moe(x_BLD)
                return super().forward(x_BLD)

        block = Greedy(layers.build_layer(CASES[0]))
        built = bound(model_of(block), "full")
        out_BLD = built.model(tokens(0))
        block.again = True
        message = r"layers\.0\.moe was called 1 times in a checkpointed forward and 2 times in its recomp"
        with pytest.raises(RuntimeError, match=message):
            out_BLD.backward(out_gradient(0))
        assert built.regions.stack == []


class Boom(Exception):
    pass


def fail(*_: Any) -> None:
    raise Boom


class TestNothingLeaks:
    """Regions end with their forward, and models do not see each other's."""

    def test_eval_between_forward_and_backward(self) -> None:
        built = bound(Model(CASES), "full")

        def evaluate(*_: Any) -> None:
            model = built.model.eval()
            with torch.no_grad():
                model(tokens(7))
            model(tokens(8))
            model.train()

        move_selection(built.model, 0)
        x_BLD = tokens(0)
        out_BLD = built.model(x_BLD)
        move_selection(built.model, 1)
        evaluate()
        out_BLD.backward(out_gradient(0))
        assert differing([take_gradients(built.model, x_BLD)], alone(Model(CASES))) == []

    def test_eval_routes_live(self) -> None:
        """A later no-grad forward is not taken for a recomputation."""
        built, plain = bound(Model(CASES), "full"), Model(CASES)
        run(built.model, "F0 B0")
        for model in (built.model, plain):
            move_selection(model, 5)
        with torch.no_grad():
            assert torch.equal(built.model(tokens(0)), plain(tokens(0)))

    def test_an_exception_in_a_forward(self) -> None:
        built = bound(Model(CASES), "full")
        hook = moes(built.model)[1].register_forward_pre_hook(fail)
        with pytest.raises(Boom) as kept:
            built.model(tokens(3))
        hook.remove()
        assert (built.regions.stack, built.regions.recomputing) == ([], False)
        assert differing(run(built.model, "F0 F1 B0 B1"), alone(Model(CASES), 2)) == []
        assert kept.value.__traceback__, "which keeps the frames of the forward"

    def test_an_exception_in_a_forward_of_another_thread(self) -> None:
        """As with asyncio.to_thread: it is handled here."""
        built = bound(Model(CASES), "full")
        moes(built.model)[1].register_forward_pre_hook(fail)
        with ThreadPoolExecutor(1) as pool:
            with pytest.raises(Boom):
                pool.submit(built.model, tokens(3)).result(timeout=60)
            assert pool.submit(lambda: built.regions.stack).result(timeout=60) == []

    def test_an_exception_in_a_recomputation(self) -> None:
        built = bound(Model(CASES), "full")
        out_BLD = built.model(tokens(3))
        hook = moes(built.model)[0].register_forward_hook(fail)
        with pytest.raises(Boom):
            out_BLD.backward(out_gradient(3))
        hook.remove()
        assert (built.regions.stack, built.regions.recomputing) == ([], False)
        built.model.zero_grad()
        assert differing(run(built.model, "F0 F1 B0 B1"), alone(Model(CASES), 2)) == []

    def test_an_exception_in_a_microbatch(self) -> None:
        built = bound(Model(CASES), "full")
        routes, installed = ReplaySession(built.slots), install(some_ids(1, 18, 2))
        with pytest.raises(Boom), routes.microbatch(microbatch(0, installed)):
            fail()
        seen = watch(built.model)
        assert differing(run(built.model, "F0 F1 B0 B1"), alone(Model(CASES), 2)) == []
        assert {routing.origin for calls in seen.values() for routing in calls} == {None}

    def test_an_inner_microbatch_gives_way_to_the_outer(self) -> None:
        built = bound(Model(CASES))
        routes, seen = ReplaySession(built.slots), watch(built.model)["layers.0.moe"]
        with routes.microbatch(microbatch(0)):
            with suppress(Boom), routes.microbatch(microbatch(1)):
                built.model(tokens(0))
                fail()
            built.model(tokens(0))
        assert [routing.origin.microbatch for routing in seen] == [1, 0]

    def test_two_models_of_the_same_names(self) -> None:
        """Their forwards and backwards interleave; one of them replays."""
        one, other = bound(Model(CASES), "full"), bound(Model(CASES[::-1]), "full")
        ids_PCK = some_ids(1, 18, 2)
        routes = ReplaySession(one.slots)
        expected = alone(following(Model(CASES), ids_PCK)) + alone(Model(CASES[::-1]))
        x_BLD, y_BLD = tokens(0), tokens(0)
        with routes.microbatch(microbatch(0, install(ids_PCK))):
            move_selection(other.model, 0)
            one_BLD, other_BLD = one.model(x_BLD), other.model(y_BLD)
            move_selection(other.model, 1)
            other_BLD.backward(out_gradient(0))
        one_BLD.backward(out_gradient(0))
        found = [take_gradients(one.model, x_BLD), take_gradients(other.model, y_BLD)]
        assert differing(found, expected) == []

    @pytest.mark.parametrize("ac", ["full", "selective"])
    def test_a_region_lives_as_long_as_its_graph(self, ac: str, monkeypatch: pytest.MonkeyPatch) -> None:
        alive: weakref.WeakSet[Region] = weakref.WeakSet()

        def region() -> Region:
            alive.add(new := Region())
            return new

        monkeypatch.setattr(regions_module, "Region", region)
        built = bound(Model(CASES), ac)
        out_BLD = built.model(tokens(0))
        assert sorted(len(region.choices) for region in alive) == [1, 1]
        out_BLD.backward(out_gradient(0))
        del out_BLD
        gc.collect()
        assert len(alive) == 0


def some_ids(seed: int, num_tokens: int, columns: int, *, missing: float = 0.0) -> Tensor:
    """``(N, columns, K)`` int8, different in a row; about this part of them missing."""
    generator = torch.Generator().manual_seed(seed)
    ids_PCK = torch.rand(num_tokens, columns, E, generator=generator).argsort(-1)[..., :K]
    absent_NGK = torch.rand(ids_PCK.shape, generator=generator) < missing
    return ids_PCK.masked_fill(absent_NGK, -1).to(torch.int8)


def install(ids_PCK: Tensor, valid_P: Tensor | None = None, *, calls: int = 1) -> Installed:
    """Columns layer by layer, call by call."""
    keys = [(layer, call) for layer in LAYERS for call in range(calls)]
    columns = {key: column for column, key in enumerate(keys[: ids_PCK.shape[1]])}
    return Installed(ids_PCK, columns, has_missing=bool((ids_PCK < 0).any()), valid_P=valid_P)


def microbatch(number: int, installed: Installed | None = None, num_tokens: int = 18) -> Microbatch:
    return Microbatch(number=number, tokens_P=torch.arange(num_tokens), installed=installed)


def following(model: Model, ids_PCK: Tensor) -> Model:
    """Routers that take these ids, column by column, whatever they score: what a replay must equal."""

    def follow(_query: Query, counter: Iterator[int]) -> Selection:
        return Selection(ids_PCK[:, next(counter)].long())

    columns = [column for _ in range(100) for column in range(ids_PCK.shape[1])]
    counter = iter(columns)
    for moe in moes(model):
        moe.router.selector = lambda query: follow(query, counter)
    return model


class Recorder:
    """Keeps ids as a trace does: narrow."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, Tensor]] = []

    def selected(self, slot: ReplaySelector, microbatch: Microbatch, choice: Selection, query: Query) -> None:
        self.seen.append((slot.layer, microbatch.calls[slot.layer], choice.ids_TK.to(torch.int8)))


class LiveToo(Recorder):
    """Asks the live router as well, as the check does."""

    def selected(self, slot: ReplaySelector, microbatch: Microbatch, choice: Selection, query: Query) -> None:
        query.ranking().topk(K + 1, dim=1)
        super().selected(slot, microbatch, choice._replace(ids_TK=query.live()), query)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How a model is driven: what is missing of the ids (None: no ids), how it is filled, who looks on."""

    missing: float | None = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    observer: Callable[[], Recorder] = Recorder

    def run(self, model: Model, ac: str, schedule: str) -> tuple[list[dict[str, Tensor]], Recorder]:
        built, observer = bound(model, ac), self.observer()
        routes = ReplaySession(built.slots, observers=(observer,), **self.options)

        def context(number: int) -> AbstractContextManager[Any]:
            installed = None
            if self.missing is not None:
                installed = install(some_ids(number, 18, 2, missing=self.missing))
            return routes.microbatch(microbatch(number, installed))

        return run(built.model, schedule, forward_in=context), observer


REPLAYS = {
    "live": Replay(missing=None),
    "live checked": Replay(missing=None, observer=LiveToo),
    "replay": Replay(),
    "replay checked": Replay(observer=LiveToo),
    "fill by score": Replay(missing=0.4),
    "fill balanced": Replay(missing=0.4, options={"fill": "balanced", "ep_size": 2}),
    "fill with zero": Replay(missing=0.4, options={"fill_weight": "zero"}),
}


class TestInstalled:
    """Ids from elsewhere, under checkpoints."""

    @pytest.mark.parametrize("replay", REPLAYS.values(), ids=REPLAYS)
    @pytest.mark.parametrize("ac", ["full", "selective", "selective-topk"])
    def test_checkpoints_change_no_gradient(self, ac: str, replay: Replay) -> None:
        expected, _ = replay.run(Model(CASES), "none", "F0 B0 F1 B1")
        found, observer = replay.run(Model(CASES), ac, "F0 F1 B0 B1")
        assert differing(found, expected) == []
        assert [(layer, call) for layer, call, _ in observer.seen] == [(layer, 1) for layer in LAYERS * 2], (
            "once per forward, never in a recomputation"
        )

    def test_gradients_are_those_of_the_ids(self) -> None:
        found, _ = REPLAYS["replay"].run(Model(CASES), "full", "F0 F1 B0 B1")
        ids_PCK = torch.cat([some_ids(number, 18, 2) for number in range(2)], dim=1)
        assert differing(found, alone(following(Model(CASES), ids_PCK), 2)) == []
        assert differing(found, alone(Model(CASES), 2)) != []

    def test_by_layer_and_call(self) -> None:
        """Columns in an order of their own; the calls of a shared layer have one each."""
        ids_PCK = some_ids(1, 18, 3)
        for build, calls in ((SHARED["one checkpoint"], 2), (SHARED["two checkpoints"], 2)):
            built = bound(build(), "full")
            seen = watch(built.model)["layers.0.moe"]
            columns = {("layers.0.moe", 0): 2, ("layers.0.moe", 1): 0}
            routes, batch = (
                ReplaySession(built.slots),
                microbatch(0, Installed(ids_PCK, columns, has_missing=False)),
            )
            found = run(built.model, "F0 B0", forward_in=lambda _n, r=routes, b=batch: r.microbatch(b))
            assert ids_of(seen)[:2] == [ids_PCK[:, 2].tolist(), ids_PCK[:, 0].tolist()]
            assert batch.calls == {"layers.0.moe": calls}
            assert [routing.origin.call for routing in seen[:2]] == [0, 1]
            assert differing(found, alone(following(build(), ids_PCK[:, [2, 0]]))) == []

    def test_layers_without_a_column_route_live(self) -> None:
        built = bound(Model(CASES), "full")
        seen, ids_PCK = watch(built.model), some_ids(1, 18, 1)
        installed = Installed(ids_PCK, {("layers.1.moe", 0): 0}, has_missing=False)
        with ReplaySession(built.slots).microbatch(microbatch(4, installed)):
            built.model(tokens(0)).backward(out_gradient(0))
        live_TK = with_input(CASES[0], tokens(0)).run().topk_ids_TK
        assert ids_of(seen["layers.0.moe"]) == [live_TK.tolist()] * 2
        assert ids_of(seen["layers.1.moe"]) == [ids_PCK[:, 0].tolist()] * 2
        for layer, there in zip(LAYERS, (False, True), strict=True):
            for routing in seen[layer]:
                assert routing.origin[:3] == (layer, 4, 0)
                assert (routing.origin.installed_TK is not None) == there

    def test_a_fill_is_frozen(self) -> None:
        """By score: another gate would fill with other experts."""
        ids_PCK = some_ids(1, 18, 2, missing=0.4)
        before, again = self._filled(ids_PCK, pinned=True)
        assert before == again
        with pytest.raises(RuntimeError, match="recomputation outside of a region would route live"):
            self._filled(ids_PCK, pinned=False)
        for layer_before, layer_ids in zip(before, ids_PCK.unbind(1), strict=True):
            there_TK = layer_ids >= 0
            filled_TK = torch.tensor(layer_before)
            assert torch.equal(filled_TK[there_TK], layer_ids[there_TK].long())
            assert all(len(set(row)) == K for row in layer_before)

    def _filled(self, ids_PCK: Tensor, *, pinned: bool) -> tuple[list[Any], list[Any]]:
        """Ids at both dispatchers, in the forward and after the gates moved."""
        built = bound(Model(CASES), "full", pinned=pinned)
        seen = watch(built.model)
        with ReplaySession(built.slots).microbatch(microbatch(0, install(ids_PCK))):
            out_BLD = built.model(tokens(0))
        move_gates(built.model, 1)
        out_BLD.backward(out_gradient(0))
        calls = [ids_of(seen[layer]) for layer in LAYERS]
        assert [len(layer) for layer in calls] == [2, 2]
        return [first for first, _ in calls], [second for _, second in calls]

    def test_a_fill_without_weight(self) -> None:
        ids_PCK = some_ids(1, 18, 2, missing=0.4)
        built = bound(Model(CASES), "full")
        seen = watch(built.model)
        with ReplaySession(built.slots, fill_weight="zero").microbatch(microbatch(0, install(ids_PCK))):
            out_BLD = built.model(tokens(0))
        move_gates(built.model, 1)
        out_BLD.backward(out_gradient(0))
        for layer, ids_NK in zip(LAYERS, ids_PCK.unbind(1), strict=True):
            assert len(seen[layer]) == 2
            for routing in seen[layer]:
                assert torch.equal(routing.topk_scores_TK == 0, ids_NK < 0)
        weighty, _ = REPLAYS["fill by score"].run(Model(CASES), "full", "F1 B1")
        weightless, _ = REPLAYS["fill with zero"].run(Model(CASES), "full", "F1 B1")
        assert "layers.1.moe.router.gate.weight of 0" in differing(weightless, weighty)

    @pytest.mark.parametrize("ac", ["none", "full"])
    def test_a_recomputation_outside_of_a_region_is_refused(self, ac: str) -> None:
        built = bound(Model(CASES), ac, pinned=False)
        with ReplaySession(built.slots).microbatch(microbatch(0)):
            if ac == "full":
                out_BLD = built.model(tokens(0))
            else:
                out_BLD = checkpoint(built.model, tokens(0), use_reentrant=False)
            layer = LAYERS[1 if ac == "full" else 0].replace(".", r"\.")
            with pytest.raises(RuntimeError, match=rf"{layer}: a recomputation outside of a region"):
                out_BLD.backward(out_gradient(0))

    def test_ids_for_another_grid_are_refused(self) -> None:
        built = bound(Model(CASES))
        message = r"layers\.0\.moe: the forward has 2 x 7 tokens, 18 are installed"
        with (
            ReplaySession(built.slots).microbatch(microbatch(0, install(some_ids(1, 18, 2)))),
            pytest.raises(ValueError, match=message),
        ):
            built.model(tokens(0, length=7))

    def test_a_router_that_is_not_told_whose_tokens_is_refused(self) -> None:
        built = bound(Model(CASES))
        with (
            ReplaySession(built.slots).microbatch(microbatch(0, install(some_ids(1, 18, 2)))),
            pytest.raises(ValueError, match=r"layers\.0\.moe: .* give the router a layout"),
        ):
            moes(built.model)[0].router(tokens(0).flatten(0, 1))

    def test_forced_balance_gives_way(self) -> None:
        """A switch inside the router's own choice; installed ids come before it."""
        model = Model(CASES)
        for moe in moes(model):
            moe.router.config = dataclasses.replace(moe.router.config, _debug_force_load_balance=True)
        found, _ = REPLAYS["replay"].run(model, "full", "F0 B0")
        assert differing(found, alone(following(Model(CASES), some_ids(0, 18, 2)))) == []


class Later(Block):
    """More of two ops behind the layer that its router, or its slot, runs too."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_TD = super().forward(x_BLD).flatten(0, 1)
        best_TK = y_TD.detach().topk(K, dim=-1).indices
        cast_TD = y_TD.to(torch.float32).to(y_TD.dtype)
        return (y_TD + cast_TD.tanh() * torch.zeros_like(y_TD).scatter(1, best_TK, 1)).view_as(x_BLD)


class TestSavedOps:
    """SAC hands saved results back by position, and a pinned recomputation does not choose again."""

    @pytest.mark.parametrize("replay", REPLAYS.values(), ids=REPLAYS)
    @pytest.mark.parametrize("ac", ["full", "selective", "selective+casts"])
    def test_the_choice_takes_no_position(self, ac: str, replay: Replay) -> None:
        """A saved topk, or copy to the host, behind the router is still the one that comes back."""
        expected, _ = replay.run(self._model(), "none", "F0 B0")
        found, _ = replay.run(self._model(), ac, "F0 B0")
        assert differing(found, expected) == []

    @pytest.mark.parametrize("ac", ["selective", "selective+casts"])
    def test_positions_are_right_without_a_pin(self, ac: str) -> None:
        assert (
            differing(run(bound(self._model(), ac, pinned=False).model, "F0 B0"), alone(self._model())) == []
        )

    def _model(self) -> Model:
        return model_of(*(Later(layers.build_layer(case)) for case in CASES))


class TestSteps:
    """Gradient accumulation over microbatches of different lengths, twice."""

    LENGTHS = (5, 7, 9)

    @pytest.mark.parametrize("ac", ["none", "full", "selective"])
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
    def test_each_microbatch_has_its_own_ids(self, ac: str, order: tuple[int, ...]) -> None:
        built, plain = bound(Model(CASES), ac), Model(CASES)
        routes = ReplaySession(built.slots)
        for step in range(2):
            ids = [some_ids(10 * step + n, 2 * length, 2) for n, length in enumerate(self.LENGTHS)]
            flight = []
            for number, length in enumerate(self.LENGTHS):
                batch = microbatch(number, install(ids[number]), 2 * length)
                x_BLD = tokens(number, length)
                with routes.microbatch(batch):
                    flight.append((x_BLD, built.model(x_BLD)))
                assert batch.calls == dict.fromkeys(LAYERS, 1), "every column was consumed"
                move_selection(built.model, number)
            expected = []
            for number in order:
                length = self.LENGTHS[number]
                flight[number][1].backward(out_gradient(number, length))
                x_BLD = tokens(number, length)
                following(plain, ids[number])(x_BLD).backward(out_gradient(number, length))
                expected.append(x_BLD.grad)
                assert torch.equal(flight[number][0].grad, x_BLD.grad)
            named = zip(built.model.parameters(), plain.parameters(), strict=True)
            for ours, theirs in named:
                assert torch.equal(ours.grad, theirs.grad)
                with torch.no_grad():
                    for parameter in (ours, theirs):
                        parameter.sub_(0.1 * parameter.grad)
                        parameter.grad = None


class TestPadding:
    """Half of the tokens are padding: they are routed, and are no load."""

    @pytest.mark.parametrize("missing", [True, False])
    @pytest.mark.parametrize("ac", ["none", "full", "selective"])
    def test_does_not_reach_counts_and_bias(self, ac: str, missing: bool) -> None:
        ids_PCK, padded_NGK, valid_P = self._data(missing)
        plain = self._counted(tokens(0, 6), "none", install(ids_PCK))
        padded = self._counted(self._padded(tokens(0, 6)), ac, install(padded_NGK, valid_P))
        without = self._counted(self._padded(tokens(0, 6)), ac, install(padded_NGK))
        assert sum(plain[0][0]) == 12 * K
        assert padded[0] == plain[0] != without[0]
        assert torch.equal(padded[1], plain[1])
        assert not torch.equal(without[1], plain[1])
        torch.testing.assert_close(padded[2][:, :6], plain[2], rtol=1e-12, atol=1e-12)

    def _data(self, missing: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of 2 x 6 tokens, of the same and 2 x 6 of padding behind, and which are which."""
        ids_PCK = some_ids(1, 12, 2)
        pads_NGK = torch.full_like(ids_PCK, -1) if missing else some_ids(2, 12, 2)
        padded = torch.cat([ids_PCK.unflatten(0, (2, 6)), pads_NGK.unflatten(0, (2, 6))], dim=1)
        valid_BL = (torch.arange(12) < 6).expand(2, 12)
        return ids_PCK, padded.flatten(0, 1), valid_BL.flatten()

    def _padded(self, x_BLD: Tensor) -> Tensor:
        return torch.cat([x_BLD.detach(), torch.ones_like(x_BLD)], dim=1).requires_grad_()

    def _counted(
        self, x_BLD: Tensor, ac: str, installed: Installed
    ) -> tuple[list[list[int]], Tensor, Tensor]:
        """Counts per layer, the biases that follow, and the output."""
        built = bound(Model(CASES), ac)
        with ReplaySession(built.slots).microbatch(microbatch(0, installed, x_BLD[..., 0].numel())):
            out_BLD = built.model(x_BLD)
            out_BLD.backward(torch.ones_like(out_BLD))
        load = counts(built.model)
        LoadBalancer([built.model], ALONE).step()
        return load, torch.stack([moe.expert_bias_E for moe in moes(built.model)]), out_BLD.detach()


def turning_ids(batch: int, length: int) -> Tensor:
    """``(B * L, 1, K)``: the ids are a function of the token's position, and name it up to 8."""
    first_N = torch.arange(batch * length) * 3
    return ((first_N[:, None] + torch.arange(K)) % E).unsqueeze(1).to(torch.int8)


def replay_on(ctx: RankContext, case: Case, mesh: Mesh, ids_N1K: Tensor, valid_P: Tensor) -> dict[str, Any]:
    """Rows and ids at the dispatcher of a checkpointed layer, run and rerun; output, gradients, load."""
    dims = layers.parallel_dims(ctx, mesh)
    layer = layers.on_mesh(layers.build_layer(case, "all_to_all"), dims, mesh)
    built = bound(nn.ModuleDict({"moe": checkpoint_wrapper(layer, early_stop=False)}))
    seen: list[Any] = []
    layer.routed_experts.register_forward_pre_hook(
        lambda _module, args: seen.append((args[0].detach(), args[1].topk_expert_ids_TK))
    )
    x_BLD = ctx.replicate(case.params["x_BLD"])
    columns = {("moe", 0): 0}
    installed = Installed(ctx.replicate(ids_N1K), columns, has_missing=False, valid_P=ctx.replicate(valid_P))
    batch = Microbatch(number=0, tokens_P=torch.arange(ids_N1K.shape[0]), installed=installed)
    with ReplaySession(built.slots).microbatch(batch):
        out = built.model["moe"](layers.placed(x_BLD, dims, mesh))
    layer.expert_bias_E.copy_(torch.linspace(1, -1, E))
    out_BLD = out.full_tensor() if isinstance(out, DTensor) else out
    out_BLD.backward(ctx.replicate(case.grad_out_BLD))
    gate = layer.router.gate.weight.grad
    return {
        "seen": seen,
        "out_BLD": out_BLD,
        "x_BLD": x_BLD.grad,
        "gate_ED": gate.full_tensor() if isinstance(gate, DTensor) else gate,
        "load_E": layer.tokens_per_expert_E,
    }


SP_MESHES = [Mesh(tp=2, ep=2), Mesh(tp=2), Mesh(tp=2, ep=2, sp=False)]


class TestSequenceParallel:
    """Ids go where their tokens go: TP 2, two sequences, lengths that TP does not divide."""

    @pytest.mark.parametrize(
        ("length", "mode"),
        [(1, "local_tensor"), (4, "local_tensor"), (5, "local_tensor"), (7, "local_tensor"), (5, "gloo")],
    )
    @pytest.mark.parametrize("mesh", SP_MESHES, ids=str)
    def test_each_token_has_its_own(self, mesh: Mesh, length: int, mode: Mode) -> None:
        case = layer_case(1, length=length)
        ids_N1K, valid_P = turning_ids(2, length), torch.arange(2 * length) % 3 != 1
        results = run_ranks(replay_on, 2, case, mesh, ids_N1K, valid_P, mode=mode)
        assert self._mistaken(case, results) == []
        whole = list(range(2 * length))
        for call in range(2):
            places = [self._places(case, result["seen"][call][0]) for result in results]
            if mesh.ep > 1:
                assert sorted(itertools.chain(*places)) == whole
            else:
                assert places == [whole, whole]
        for result, held in zip(results, places, strict=True):
            counted = ids_N1K[[n for n in held if valid_P[n]]].long()
            assert result["load_E"].tolist() == counted.flatten().bincount(minlength=E).tolist()
        out, gradients = case.run_with_gradients(ids_N1K[:, 0].long())
        for name, expected in {"out_BLD": out.out_BLD.detach(), **gradients}.items():
            for result in results if name in ("out_BLD", "x_BLD", "gate_ED") else []:
                torch.testing.assert_close(result[name], expected, rtol=1e-10, atol=1e-12)

    def test_a_flat_offset_per_rank_would_be_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """pytorch/torchtitan#3604: right for one sequence only."""

        def flat(_layer: str, layout: TokenLayout, ids_PCK: Tensor) -> Tensor:
            return torch.arange(layout.num_local_tokens) + layout.sp_rank * layout.num_local_tokens

        monkeypatch.setattr(selectors_module, "places", flat)
        case = layer_case(1, length=4)
        ids_N1K, valid_P = turning_ids(2, 4), torch.ones(8, dtype=torch.bool)
        results = run_ranks(replay_on, 2, case, SP_MESHES[0], ids_N1K, valid_P, mode="local_tensor")
        assert self._mistaken(case, results) != []

    def _mistaken(self, case: Case, results: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
        """Rank, call and position of the tokens that did not get their ids."""
        ids_NK = turning_ids(*case.params["x_BLD"].shape[:2])[:, 0].long()
        found = []
        for rank, result in enumerate(results):
            assert len(result["seen"]) == 2, "a forward and its recomputation"
            for call, (x_TD, ids_TK) in enumerate(result["seen"]):
                places = self._places(case, x_TD)
                found += [
                    (rank, call, place)
                    for place, ids_K in zip(places, ids_TK, strict=True)
                    if not torch.equal(ids_NK[place], ids_K)
                ]
        return found

    def _places(self, case: Case, x_TD: Tensor) -> list[int]:
        """Which tokens these rows are, by their contents."""
        all_ND = case.params["x_BLD"].detach().flatten(0, 1)
        return [int((all_ND == x_D).all(1).nonzero().item()) for x_D in x_TD]


def parallelized(ctx: RankContext, ac: str, compiled: bool) -> tuple[list[str], list[str], int]:
    """Names of the slots of a parallelized debug model with MTP, names of its routers, and its regions."""
    config = model_registry("debugmodel", num_mtp_layers=1).model
    swap_moe(config, dispatcher="local")
    with torch.device("meta"):
        model: Any = config.build()
    names = [name.removesuffix(".router") for name, m in model.named_modules() if _is_router(m)]
    parallelize(
        model,
        parallel_dims=layers.parallel_dims(ctx, Mesh()),
        training=TrainingConfig(),
        parallelism=ParallelismConfig(),
        compile_config=CompileConfig(enable=compiled, components=["model"]),
        ac_config=AC[ac].Config(),
        dump_folder="",
    )
    regions = [
        getattr(module.checkpoint_fn.keywords.get("context_fn"), "func", None)
        for module in model.modules()
        if _is_wrapper(module)
    ]
    pinned = sum(getattr(contexts, "__func__", None) is Regions.contexts for contexts in regions)
    return [slot.layer for slot in selectors_of(model)], names, pinned


def _is_router(module: nn.Module) -> bool:
    return isinstance(module, TokenChoiceTopKRouter)


class TestBinding:
    """By the names of the live model, not by the order in which routers were made."""

    @pytest.mark.parametrize("ac", ["full", "selective"])
    def test_every_router_of_a_parallelized_model(self, ac: str) -> None:
        ((slots, routers, pinned),) = run_ranks(parallelized, 1, ac, False, mode="local_tensor")
        assert slots == routers == [*(f"layers.{number}.moe" for number in range(1, 6)), "mtp_layers.0.moe"]
        assert pinned == 6, "one per decoder layer"

    def test_a_compiled_model_has_no_slots(self) -> None:
        ((slots, routers, pinned),) = run_ranks(parallelized, 1, "full", True, mode="local_tensor")
        assert (slots, len(routers), pinned) == ([], 6, 0)

    @pytest.mark.parametrize("ac", ["none", "full", "selective"])
    def test_names_do_not_show_checkpoints(self, ac: str) -> None:
        built = bound(Model(CASES), ac)
        assert [slot.layer for slot in built.slots] == LAYERS
        assert [moe.router.selector for moe in moes(built.model)] == built.slots == selectors_of(built.model)

    @pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"])
    def test_names_do_not_show_wrappers(self, wrapper: str) -> None:
        inner = nn.ModuleDict({wrapper: Model(CASES)})
        for block, moe in zip(inner[wrapper].layers, moes(inner), strict=True):
            inner[wrapper].layers[block] = nn.ModuleDict({wrapper: nn.ModuleDict({"moe": moe})})
        slots = bind_selectors(nn.ModuleDict({wrapper: inner}), Regions())
        assert [slot.layer for slot in slots] == LAYERS

    def test_a_layer_alone(self) -> None:
        assert [slot.layer for slot in bind_selectors(moes(Model(CASES))[0], Regions())] == ["router"]

    def test_shapes(self) -> None:
        assert [slot.shape for slot in bound(Model(CASES)).slots] == [(layer, E, K) for layer in LAYERS]

    def test_dense_layers_take_no_slot(self) -> None:
        blocks = [nn.Linear(D, D), Block(layers.build_layer(CASES[0])), nn.Linear(D, D)]
        assert [slot.layer for slot in bind_selectors(model_of(*blocks), Regions())] == ["layers.1.moe"]

    def test_made_in_another_order(self) -> None:
        later, earlier = (Block(layers.build_layer(case)) for case in (CASES[1], CASES[0]))
        built = bound(model_of(earlier, later), "full")
        ids_PCK = some_ids(0, 18, 2)
        seen = watch(built.model)
        with ReplaySession(built.slots).microbatch(microbatch(0, install(ids_PCK))):
            built.model(tokens(0))
        assert [ids_of(seen[layer]) for layer in LAYERS] == [[ids.tolist()] for ids in ids_PCK.unbind(1)]

    def test_orphans_have_no_part(self) -> None:
        """A decoder that was built, bound and thrown away (verl#7340)."""
        orphan = bound(Model(CASES))
        orphan_routes = ReplaySession(orphan.slots)
        built = bound(Model(CASES), "full")
        routes, ids_PCK = ReplaySession(built.slots), some_ids(0, 18, 2)
        seen, orphan_seen = watch(built.model), watch(orphan.model)
        batch = microbatch(0, install(ids_PCK))
        with orphan_routes.microbatch(microbatch(9)), routes.microbatch(batch):
            orphan.model(tokens(0))
            built.model(tokens(0))
        assert batch.calls == dict.fromkeys(LAYERS, 1)
        assert [ids_of(seen[layer]) for layer in LAYERS] == [[ids.tolist()] for ids in ids_PCK.unbind(1)]
        live_TK = with_input(CASES[0], tokens(0)).run().topk_ids_TK
        assert ids_of(orphan_seen["layers.0.moe"]) == [live_TK.tolist()]

    def test_a_rebuilt_router_shows(self) -> None:
        """It routes live and has no slot; binding again gives it one, and a pin that holds."""
        built = bound(Model(CASES), "full")
        moe = moes(built.model)[0]
        rebuilt = moe.router.config.build()
        rebuilt.gate.weight = moe.router.gate.weight
        moe.router = rebuilt
        assert selectors_of(built.model) == built.slots[1:]
        again = bound(built.model)
        assert [slot.layer for slot in selectors_of(built.model)] == LAYERS
        assert differing(run(again.model, "F0 F1 B0 B1"), alone(Model(CASES), 2)) == []

    def test_mtp_blocks_have_names_of_their_own(self) -> None:
        """Their numbers start anew, as in torchtitan's MTPDecoder."""

        class WithMTP(Model):
            def __init__(self) -> None:
                super().__init__(CASES)
                self.mtp_layers = nn.ModuleDict({"0": Block(layers.build_layer(layer_case(3)))})

            def forward(self, x_BLD: Tensor) -> Tensor:
                x_BLD = super().forward(x_BLD)
                return x_BLD + self.mtp_layers["0"](x_BLD)

        names = [*LAYERS, "mtp_layers.0.moe"]
        built = bound(WithMTP(), "full")
        assert [slot.layer for slot in built.slots] == names
        ids_PCK = some_ids(0, 18, 3)
        columns = {(name, 0): column for column, name in enumerate(names)}
        batch = microbatch(0, Installed(ids_PCK, columns, has_missing=False))
        seen = watch(built.model)
        routes = ReplaySession(built.slots)
        found = run(built.model, "F0 B0", forward_in=lambda _number: routes.microbatch(batch))
        assert batch.calls == dict.fromkeys(names, 1)
        assert [ids_of(seen[name])[0] for name in names] == [ids.tolist() for ids in ids_PCK.unbind(1)]
        assert differing(found, alone(following(WithMTP(), ids_PCK))) == []
