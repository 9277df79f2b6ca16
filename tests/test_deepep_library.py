"""``transport = "deep_ep"`` on a double of the DeepEP library, in processes on CPU.

Nothing here runs the library. These tests say that titan_moe keeps the library's contract as
``tests/fake_deep_ep.py`` writes it down, and that what it computes on such a library is right.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed.activation_checkpoint import SelectiveAC

from tests import fake_deep_ep as fake
from tests.fake_deep_ep import ContractError, ElasticBuffer
from tests.ranks import RankContext, RankError, run_ranks
from tests.test_dispatch import (
    CASES,
    RANKS,
    D,
    E,
    OnRank,
    Outcome,
    Problem,
    Step,
    by_group,
    dense,
    different_bits,
    expected_rows,
    groups,
)
from titan_moe.layer.dispatch.base import DispatchLimits, Routing, Traffic
from titan_moe.layer.dispatch.deepep import library as deepep_library
from titan_moe.layer.dispatch.deepep.dispatcher import DeepEPDispatcher
from titan_moe.layer.dispatch.deepep.library import Library
from titan_moe.layer.layout import TokenLayout

# No code of ours touches a device because of them.
CUDA = DispatchLimits(
    num_experts=E, top_k=2, dim=D, ep_size=2, num_max_tokens_per_rank=32, device_type="cuda"
)
on_both_sizes = pytest.mark.parametrize("ep", [2, 4])
in_every_case = pytest.mark.parametrize("case", CASES)


@contextmanager
def library(**chosen: Any) -> Iterator[None]:
    """The double in the library's place, with room for rows as short as these tests'."""
    try:
        rows = {"hidden_multiple": 8, **chosen}
        with fake.installed(**rows), mock.patch.object(deepep_library, "HIDDEN_MULTIPLE", 8):
            yield
    finally:
        deepep_library._BUFFERS.clear()  # a failed body leaves some, and the worker lives on


class OnLibrary(OnRank):
    """OnRank on the double; ``reference`` serves the same problem by c10d's per_rank."""

    def __init__(
        self,
        ctx: RankContext,
        ep: int,
        groups: list[Problem],
        cls: type[DeepEPDispatcher] = DeepEPDispatcher,
        num_max_tokens: int = 32,
    ) -> None:
        super().__init__(ctx, "deepep-c10d-per_rank", ep, groups)
        self.reference = self.dispatcher
        sizes = {"ep_size": ep, "top_k": self.ids_TK.shape[1], "num_max_tokens_per_rank": num_max_tokens}
        limits = dataclasses.replace(CUDA, **sizes)
        config = cls.Config(num_experts=E, top_k=limits.top_k, transport="deep_ep")
        config.validate(limits)
        self.dispatcher: DeepEPDispatcher = cls(config)
        self.dispatcher.bind(self.reference.ep_mesh, limits)

    def run(self) -> Outcome:
        return self.backward(self.forward())

    def on_reference(self) -> Outcome:
        with mock.patch.object(self, "dispatcher", self.reference):
            return self.run()

    def traffic(self) -> list[Traffic]:
        """What the double's transport and c10d's report for this problem."""
        ours = self.dispatcher.traffic(self.dispatch().metadata, 2)
        with mock.patch.object(self, "dispatcher", self.reference):
            return [ours, self.dispatcher.traffic(self.dispatch().metadata, 2)]

    def tags(self) -> Tensor:
        """Where each row comes from: 100 * source rank + local token."""
        assert self.reference.ep_mesh is not None
        x_TD = torch.zeros_like(self.x_TD)
        x_TD[:, 0] = self.reference.ep_mesh.get_local_rank()
        x_TD[:, 1] = torch.arange(len(x_TD))
        x_RD = self.dispatch(x_TD=x_TD).x_RD.int()
        return 100 * x_RD[:, 0] + x_RD[:, 1]


def round_trips(
    ctx: RankContext, ep: int, rounds: dict[str, list[Problem]], sum_order: str, cls: Any
) -> dict[str, dict[str, Any]]:
    """Each round on the double in all the ways a step may go, and on c10d; and where every row went."""
    answers = {}
    for case, some in rounds.items():
        with library(sum_order=sum_order):
            here = OnLibrary(ctx, ep, some, cls)
            x_RD, counts_e, receipt = here.dispatch()
            y_RD = here.experts(x_RD, counts_e)
            first, second = here.dispatcher.combine(y_RD, receipt), here.dispatcher.combine(y_RD, receipt)
            recomputed = checkpoint(here.forward, here.x_TD, here.scores_TK, use_reentrant=False)
            selective = SelectiveAC.Config().build(dump_folder="")._wrap_block(Step(here))
            answers[case] = {
                "once": here.backward(first, retain_graph=True),
                "second combine": here.backward(second),
                "again": here.run(),
                "recomputed": here.backward(recomputed),
                "recomputed in part": here.backward(selective(here.x_TD, here.scores_TK)),
                "c10d": here.on_reference(),
                "counts_e": counts_e,
                "tags_R": here.tags(),
                "traffic": here.traffic(),
            }
            here.dispatcher.unbind()
    return answers


def results(ep: int, sum_order: str = "rank", cls: Any = DeepEPDispatcher) -> list[dict[str, Any]]:
    """round_trips' answers by rank; sums in c10d's order unless asked otherwise."""
    return _results(ep, sum_order, cls)


@functools.cache
def _results(ep: int, sum_order: str, cls: Any) -> list[dict[str, Any]]:
    cases = CASES if cls is DeepEPDispatcher else ("random",)  # one is enough for a fault
    rounds = {case: groups(case, ep, "bf16") for case in cases}
    return run_ranks(round_trips, RANKS, ep, rounds, sum_order, cls)


def misplaced(ep: int, cls: Any = DeepEPDispatcher) -> list[str]:
    """Cases in which a rank got other rows, or in another order, than the dispatcher contract says."""
    wrong = []
    for rank, answer in enumerate(results(ep, cls=cls)):
        for case, got in answer.items():
            rows = expected_rows(case, ep, rank // ep, rank % ep)
            tags = [tag for expert in rows for tag in expert]
            if got["counts_e"].tolist() != [*map(len, rows)] or got["tags_R"].tolist() != tags:
                wrong.append(f"{case} on rank {rank}")
    return wrong


# Faults: each forgets what one line of titan_moe does, and the tests must notice.


class Unwaited(DeepEPDispatcher):
    """Takes the result before its event."""

    def finish_combine(self, in_flight: Any, metadata: Any) -> Tensor:
        return in_flight.out_QD[: metadata.num_local_tokens]


class ZerosMasked(DeepEPDispatcher):
    """Drops picks whose score is 0, as torchtitan 0.3.0's wrapper does."""

    def dispatch(self, x_TD: Tensor, routing: Routing, layout: TokenLayout) -> Any:
        return super().dispatch(x_TD, routing._replace(present_TK=routing.topk_scores_TK != 0), layout)


class Unordered(DeepEPDispatcher):
    """A buffer that was not made deterministic."""

    def bind(self, *args: Any) -> None:
        super().bind(*args)
        fake.alive[-1].deterministic = False


class TestNumbers:
    """What is computed on the double."""

    @on_both_sizes
    @in_every_case
    def test_has_the_bits_of_c10d(self, ep: int, case: str) -> None:
        """Output and gradients of per_rank on c10d, where the ranks are summed in the same order."""
        for rank in results(ep):
            assert different_bits(rank[case]["once"], rank[case]["c10d"]) == []

    @on_both_sizes
    @in_every_case
    @pytest.mark.parametrize("sum_order", ["rank", "slot"])
    def test_is_close_to_a_dense_loop(self, ep: int, case: str, sum_order: str) -> None:
        """fp64; also where the ranks are summed in the order of the library's kernels."""
        for group, outcome in enumerate(by_group(results(ep, sum_order), ep, case, "once")):
            for field, got, want in zip(Outcome._fields, outcome, dense(case, ep, group), strict=True):
                torch.testing.assert_close(
                    got.double(), want, rtol=0.03, atol=0.03, msg=lambda m, f=field: f"{f}: {m}"
                )

    def test_two_ranks_are_summed_alike_in_both_orders(self) -> None:
        for by_rank, by_slot in zip(results(2), results(2, "slot"), strict=True):
            for case in CASES:
                assert different_bits(by_rank[case]["once"], by_slot[case]["once"]) == []

    @on_both_sizes
    @pytest.mark.parametrize("again", ["again", "second combine", "recomputed", "recomputed in part"])
    def test_twice_gives_the_same_bits(self, ep: int, again: str) -> None:
        for rank in results(ep):
            for case, got in rank.items():
                assert different_bits(got["once"], got[again]) == [], case

    @on_both_sizes
    def test_rows_are_in_canonical_order(self, ep: int) -> None:
        assert misplaced(ep) == []

    @on_both_sizes
    def test_rows_in_another_order_are_noticed(self, ep: int) -> None:
        assert misplaced(ep, Unordered)

    @on_both_sizes
    @in_every_case
    def test_traffic_is_that_of_c10d(self, ep: int, case: str) -> None:
        """As many rows over all ranks; each with K ids and scores, where c10d sends those it needs."""
        ours, c10d = zip(*(rank[case]["traffic"] for rank in results(ep)), strict=True)
        for rows in ("dispatch_rows", "combine_rows", "combine_bytes"):
            assert sum(getattr(t, rows) for t in ours) == sum(getattr(t, rows) for t in c10d)
        top_k = CASES[case][1]
        assert [t.dispatch_bytes for t in ours] == [t.dispatch_rows * (2 * D + 12 * top_k) for t in ours]

    @on_both_sizes
    def test_a_missing_wait_is_noticed(self, ep: int) -> None:
        for outcome in by_group(results(ep, cls=Unwaited), ep, "random", "once"):
            assert outcome.out_TD.isnan().all()

    @on_both_sizes
    def test_scores_gradient_stays_fp32(self, ep: int) -> None:
        """In dtype and in value: one that went through bf16 has at most 8 bits set."""
        for outcome in by_group(results(ep), ep, "random", "once"):
            gradient = outcome.scores_TK
            assert gradient.dtype == torch.float32
            assert not torch.equal(gradient, gradient.bfloat16().float())

    @on_both_sizes
    @pytest.mark.parametrize(("cls", "keeps"), [(DeepEPDispatcher, True), (ZerosMasked, False)])
    def test_zero_scores_keep_their_gradient(self, ep: int, cls: Any, keeps: bool) -> None:
        some = [
            dataclasses.replace(
                group, scores_TK=[scores * torch.tensor([0.0, 1.0, 0.0]) for scores in group.scores_TK]
            )
            for group in groups("random", ep, "bf16")
        ]
        ranks = run_ranks(round_trips, RANKS, ep, {"random": some}, "rank", cls)
        ways = [by_group(ranks, ep, "random", way) for way in ("once", "c10d")]
        for got, reference in zip(*ways, strict=True):
            assert (reference.scores_TK != 0).all()
            assert torch.equal(got.scores_TK, reference.scores_TK) == keeps
            assert (got.scores_TK[:, ::2] != 0).any() == keeps

    @on_both_sizes
    @pytest.mark.parametrize("backward_first", ["A", "B"])
    def test_two_microbatches_in_flight(self, ep: int, backward_first: str) -> None:
        a, b = groups("idle_ranks", ep, "bf16"), groups("empty_middle_rank", ep, "bf16")
        for answer in run_ranks(interleaved, RANKS, ep, {"A": a, "B": b}, backward_first):
            for batch, (in_flight, alone) in answer.items():
                assert different_bits(in_flight, alone) == [], batch


def interleaved(
    ctx: RankContext, ep: int, microbatches: dict[str, list[Problem]], backward_first: str
) -> dict[str, tuple[Outcome, Outcome]]:
    """Both dispatched, both combines started, B's finished first; and each alone. One dispatcher."""
    with library():
        batches = {key: OnLibrary(ctx, ep, some) for key, some in microbatches.items()}
        batches["B"].dispatcher.unbind()
        shared = batches["B"].dispatcher = batches["A"].dispatcher
        sent = {key: here.dispatch() for key, here in batches.items()}
        rows = {key: here.experts(*sent[key][:2]) for key, here in batches.items()}
        started = {key: shared.start_combine(rows[key], sent[key].metadata) for key in batches}
        out = {key: shared.finish_combine(started[key], sent[key].metadata) for key in "BA"}
        order = "AB" if backward_first == "A" else "BA"
        in_flight = {key: batches[key].backward(out[key]) for key in order}
        alone = {key: batches[key].run() for key in batches}
        shared.unbind()
    return {key: (in_flight[key], alone[key]) for key in batches}


def calls_of(ctx: RankContext, body: Callable[..., None], *args: Any) -> list[tuple[Any, ...]]:
    """What the double was asked for while ``body`` ran."""
    with library():
        body(ctx, *args)
        return [tuple(call) for call in fake.calls]


def layers(ctx: RankContext, sizes: list[tuple[int, int]], axes: list[str]) -> None:
    """Makes a layer per (tokens, K) and mesh axis of a 2 by 2 mesh, then releases them."""
    mesh = ctx.device_mesh((2, 2), ("dp", "ep"))
    made = []
    for axis in axes:
        for num_tokens, top_k in sizes:
            limits = dataclasses.replace(CUDA, num_max_tokens_per_rank=num_tokens, top_k=top_k)
            made.append(Library(mesh[axis].get_group(), E, limits))
    for layer in made:
        fake.calls.append(fake.Call("release", -1, {}))
        layer.release()


def step(ctx: RankContext, some: list[Problem]) -> None:
    here = OnLibrary(ctx, 2, some)
    here.run()
    here.dispatcher.unbind()


def grown_between(ctx: RankContext, some: list[Problem]) -> None:
    """A layer works on after a later one, which needs more, has joined its buffer."""
    here = OnLibrary(ctx, 2, some, num_max_tokens=10)
    assert here.reference.ep_mesh is not None
    limits = dataclasses.replace(CUDA, num_max_tokens_per_rank=40, top_k=5, dim=2 * D)
    later = Library(here.reference.ep_mesh.get_group(), E, limits)
    assert different_bits(here.run(), here.on_reference()) == []
    later.release()
    here.dispatcher.unbind()


def on_a_group_that_ends(ctx: RankContext, release_first: bool) -> None:
    group = dist.new_group(list(range(ctx.world_size)))
    layer = Library(group, E, dataclasses.replace(CUDA, ep_size=ctx.world_size))
    if release_first:
        layer.release()
    dist.destroy_process_group(group)
    if not release_first:
        layer.release()


def calls(body: Callable[..., None], *args: Any) -> list[tuple[Any, ...]]:
    """calls_of's answer, the same on all ranks but for the number of rows."""
    answers = run_ranks(calls_of, RANKS, body, *args)
    without_rows = [
        [(*call[:2], {k: v for k, v in call[2].items() if k != "rows"}) for call in ours] for ours in answers
    ]
    assert all(ours == without_rows[0] for ours in without_rows)
    return without_rows[0]


class TestBuffers:
    """As the double's log tells it, which counts a buffer's making and its destruction on every rank."""

    def test_a_step(self) -> None:
        """Made once, with the options that the contracts need; backward goes along the handle."""
        made, *others = calls(step, groups("random", 2, "bf16"))
        assert made[2] == {
            "num_max_tokens_per_rank": 32,
            "hidden": D,
            "num_topk": 3,
            "deterministic": True,
            "allow_multiple_reduction": False,
            "explicitly_destroy": True,
        }
        names = ["dispatch", "combine", "wait", "cached dispatch", "combine", "destroy"]
        assert [name for name, *_ in others] == names
        assert [sizes["weights"] for name, _, sizes in others if name == "combine"] == [False, True]

    def test_layers_share_one_until_the_last_is_released(self) -> None:
        names = [name for name, *_ in calls(layers, [(32, 2)] * 3, ["ep"])]
        assert names == ["init", "release", "release", "release", "destroy"]

    def test_two_groups_have_two(self) -> None:
        order = [(name, buffer) for name, buffer, _ in calls(layers, [(32, 2)] * 2, ["dp", "ep"])]
        released = ("release", -1)
        assert order[:2] == [("init", 0), ("init", 1)]
        assert order[2:] == [released, released, ("destroy", 0), released, released, ("destroy", 1)]

    def test_grows_for_a_later_layer(self) -> None:
        log = [call for call in calls(layers, [(8, 3), (32, 2), (16, 2)], ["ep"]) if call[0] != "release"]
        assert [call[:2] for call in log] == [("init", 0), ("destroy", 0), ("init", 1), ("destroy", 1)]
        sizes = [(s["num_max_tokens_per_rank"], s["num_topk"]) for name, _, s in log if name == "init"]
        assert sizes == [(8, 3), (32, 3)]

    def test_an_earlier_layer_works_on_the_grown_one(self) -> None:
        names = [name for name, *_ in calls(grown_between, groups("random", 2, "bf16"))]
        assert names[:3] == ["init", "destroy", "init"]

    def test_is_freed_before_its_group_ends(self) -> None:
        assert [name for name, *_ in calls(on_a_group_that_ends, True)] == ["init", "destroy"]
        with pytest.raises(RankError, match="ContractError: the process group ended before the buffer"):
            calls(on_a_group_that_ends, False)

    def test_too_many_tokens(self) -> None:
        with pytest.raises(RankError, match="ValueError: 10 tokens on a rank exceed the 3 that"):
            run_ranks(with_room_for_three, RANKS, groups("random", 2, "bf16"))


def with_room_for_three(ctx: RankContext, some: list[Problem]) -> None:
    with library():
        OnLibrary(ctx, 2, some, num_max_tokens=3).forward()


OLD = ModuleType("deep_ep")
OLD.__version__ = "1.2.1"  # type: ignore[attr-defined]
# name: limits, what ``import deep_ep`` finds, combine, words of the reason
UNFIT: dict[str, tuple[dict[str, Any], Any, str, list[str]]] = {
    "absent": (
        {},
        None,
        "per_rank",
        ["does not load", "install DeepEP 2", "github.com/deepseek-ai/DeepEP"],
    ),
    "too old": ({}, OLD, "per_rank", ["1.2.1", "no ElasticBuffer", "install DeepEP 2"]),
    "of no version": ({}, ModuleType("deep_ep"), "per_rank", ["unknown version", "no ElasticBuffer"]),
    "CPU": ({"device_type": "cpu"}, fake, "per_rank", ["works on CUDA, not on cpu"]),
    "no kernel": ({"dim": 20}, fake, "per_rank", ["dims that are multiples of 8", "20"]),
    "K": ({"top_k": 33}, fake, "per_rank", ["at most 32 experts per token", "33"]),
    "fp32": ({"dtype": torch.float32}, fake, "per_rank", ["training.mixed_precision_param is float32"]),
    "compiled": ({"compiled": True}, fake, "per_rank", ["torch.compile"]),
    "per_slot": ({}, fake, "per_slot", ["moe.deepep.combine 'per_slot'"]),
}
on_unfit = pytest.mark.parametrize(("changes", "module", "combine", "words"), UNFIT.values(), ids=UNFIT)


def config(transport: Any, combine: Any = "per_rank") -> DeepEPDispatcher.Config:
    return DeepEPDispatcher.Config(num_experts=E, top_k=2, transport=transport, combine=combine)


class TestChoice:
    """Which transport is taken, by what ``import deep_ep`` finds; the double counts as a fit library."""

    @pytest.fixture(autouse=True)
    def _short_rows(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(deepep_library, "HIDDEN_MULTIPLE", 8)

    @on_unfit
    def test_a_library_asked_for_by_name_is_refused(
        self, monkeypatch: Any, changes: dict[str, Any], module: Any, combine: str, words: list[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "deep_ep", module)
        with pytest.raises(ValueError) as refusal:
            config("deep_ep", combine).validate(dataclasses.replace(CUDA, **changes))
        message = str(refusal.value)
        assert message.startswith("moe.deepep.transport 'deep_ep': ")
        assert message.endswith("; or use 'c10d'")
        assert "\n" not in message
        assert [word for word in words if word not in message] == []

    @on_unfit
    def test_auto_takes_c10d(
        self, monkeypatch: Any, changes: dict[str, Any], module: Any, combine: str, words: list[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "deep_ep", module)
        limits = dataclasses.replace(CUDA, **changes)
        config("auto", combine).validate(limits)
        assert config("auto", combine).why_not_library(limits) is not None

    @pytest.mark.parametrize(
        "error", [OSError("libnccl.so.2:\n  no such file"), AssertionError("NCCL 2.27 < 2.30.4")]
    )
    def test_a_library_that_fails_to_load_is_quoted_in_one_line(self, error: Exception) -> None:
        with mock.patch.object(deepep_library.importlib, "import_module", side_effect=error):
            reason = config("auto").why_not_library(CUDA)
        assert reason is not None
        assert " ".join(str(error).split()) in reason
        assert "\n" not in reason

    def test_a_fit_library_is_taken(self, monkeypatch: Any) -> None:
        monkeypatch.setitem(sys.modules, "deep_ep", fake)
        for transport, taken in (("auto", True), ("deep_ep", True), ("c10d", False)):
            config(transport).validate(CUDA)
            assert (config(transport).why_not_library(CUDA) is None) == taken

    def test_bind_takes_what_config_says(self) -> None:
        asked = [("auto", "cuda"), ("deep_ep", "cuda"), ("c10d", "cuda"), ("auto", "cpu")]
        for bound in run_ranks(bound_transports, RANKS, asked):
            assert bound == ["Library", "Library", "PerRank", "PerRank"]


def bound_transports(ctx: RankContext, asked: list[tuple[str, str]]) -> list[str]:
    names = []
    with library():
        for transport, device_type in asked:
            dispatcher = DeepEPDispatcher(config(transport))
            limits = dataclasses.replace(CUDA, ep_size=RANKS, device_type=device_type)
            dispatcher.bind(ctx.device_mesh((RANKS,), ("ep",)), limits)
            names.append(type(dispatcher.transport).__name__)
            dispatcher.unbind()
    return names


X = torch.ones(4, D, dtype=torch.bfloat16)
IDS = torch.tensor([[0, 1], [2, -1], [3, 7], [-1, -1]])
PICKS = {"topk_idx": IDS, "topk_weights": torch.ones(4, 2), "num_experts": E}
# A dispatch that keeps the contract but for these arguments, by the words it is refused with.
WRONG_DISPATCHES: dict[str, dict[str, Any]] = {
    "x must be contiguous bfloat16": {"x": X.float()},
    "x must be contiguous": {"x": torch.ones(D, 4, dtype=torch.bfloat16).t()},
    "no rows": {"x": X[:0], "topk_idx": IDS[:0], "topk_weights": torch.ones(0, 2)},
    "4 rows exceed num_max_tokens_per_rank 3": {"num_max_tokens_per_rank": 3},
    "num_max_tokens_per_rank 9, the buffer's is 8": {"num_max_tokens_per_rank": 9},
    "hidden 24, the buffer's is 16": {"x": torch.ones(4, 24, dtype=torch.bfloat16)},
    "no kernel for hidden 12": {"x": torch.ones(4, 12, dtype=torch.bfloat16)},
    "topk_idx must be contiguous int64": {"topk_idx": IDS.int()},
    "topk_weights must be contiguous float32": {"topk_weights": torch.ones(4, 2).double()},
    "num_topk 3, the buffer's is 2": {"topk_idx": IDS.new_full((4, 3), -1), "topk_weights": torch.ones(4, 3)},
    "an expert id is out of range": {"topk_idx": IDS + 1},
    "a token picked an expert twice": {"topk_idx": IDS * 0},
    "estimated without num_experts": {"num_experts": None},
}


def words_of(action: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        action(*args, **kwargs)
    except ContractError as error:
        return str(error)
    return "nothing"


def buffers(ctx: RankContext) -> Callable[..., ElasticBuffer]:
    group = ctx.device_mesh((RANKS,), ("ep",)).get_group()
    sizes = {"hidden": D, "num_topk": 2, "num_max_tokens_per_rank": 8, "explicitly_destroy": True}
    return lambda **others: ElasticBuffer(group, **{**sizes, **others})


def refusals(ctx: RankContext) -> list[tuple[str, str]]:
    """The words expected, and the double's."""
    make, one_off = buffers(ctx), min(ctx.rank, 1)
    with library():
        buffer = make()
        said = [(w, words_of(buffer.dispatch, **{"x": X, **PICKS, **c})) for w, c in WRONG_DISPATCHES.items()]
        x, *_, handle, event = buffer.dispatch(X, **PICKS)
        again = functools.partial(buffer.dispatch, X, handle=handle)
        more, weights = torch.cat([x, X[:1]]), torch.ones(len(x), 2)
        said += [
            ("a synchronous call", words_of(event.current_stream_wait)),
            ("num_sms was not given", words_of(again)),
            ("must be None", words_of(again, num_sms=4, topk_idx=IDS)),
            ("must not be True", words_of(again, num_sms=4, do_cpu_sync=True)),
            ("the handle's are (8, 8)", words_of(again, num_sms=4, num_max_tokens_per_rank=7)),
            ("3 rows for a handle of 4", words_of(buffer.dispatch, X[:3], handle=handle, num_sms=4)),
            ("were received", words_of(buffer.combine, more, handle)),
            ("combine on rank 0: x must be", words_of(buffer.combine, x.float(), handle)),
            ("must be float32", words_of(buffer.combine, x, handle, weights.bfloat16())),
            ("calls ('dispatch'", words_of(buffer.dispatch, X, num_max_tokens_per_rank=4 + one_off, **PICKS)),
            ("calls ('init'", words_of(make, num_topk=2 + one_off)),
            ("no kernel for hidden 20", words_of(make, hidden=20)),
            ("num_topk 33 exceeds 32", words_of(make, num_topk=33)),
        ]
        torch.use_deterministic_algorithms(True)
        said.append(("fill_uninitialized_memory", words_of(buffer.dispatch, X, **PICKS)))
        torch.use_deterministic_algorithms(False)
        buffer.destroy()
        said.append(("was destroyed", words_of(buffer.dispatch, X, **PICKS)))
        said.append(("needs explicitly_destroy=True", words_of(make(explicitly_destroy=False).destroy)))
        fake.alive.clear()
    with fake.installed():
        said.append(("no kernel for hidden 16", words_of(make)))
    return [*said, ("1 buffers were not destroyed", words_of(never_destroyed, make))]


def never_destroyed(make: Callable[..., ElasticBuffer]) -> None:
    with library():
        make()


def sum_of_three(ctx: RankContext, sum_order: str) -> float:
    """2**24 from rank 0, 1 from rank 1 and -2**24 from rank 2, which is the second pick."""
    ids = torch.tensor([[0, 4, 2] if ctx.rank == 0 else [-1, -1, -1]])
    with library(sum_order=sum_order):
        buffer = buffers(ctx)(num_topk=3)
        x, *_, handle, _ = buffer.dispatch(X[:1], ids, torch.ones(1, 3), num_experts=E)
        out, *_ = buffer.combine(x * [2.0**24, 1, -(2.0**24), 0][ctx.rank], handle)
        buffer.destroy()
    return out[0, 0].item()


class TestDouble:
    """The double itself, without titan_moe."""

    def test_breaches_are_refused(self) -> None:
        for said in run_ranks(refusals, RANKS):
            assert [(expected, words) for expected, words in said if expected not in words] == []

    def test_sums_in_the_order_asked_for(self) -> None:
        """By picks 2**24 - 2**24 + 1, by ranks 2**24 + 1 - 2**24, in fp32."""
        assert run_ranks(sum_of_three, RANKS, "slot")[0] == 1
        assert run_ranks(sum_of_three, RANKS, "rank")[0] == 0
