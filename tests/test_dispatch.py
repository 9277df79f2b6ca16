"""The dispatcher contract of titan_moe/layer/dispatch/base.py, for every registered dispatcher and EP size.

No backend is named here: what a dispatcher serves and promises comes from its class facts and its Config, so
that a new line in DISPATCHERS brings its own tests. Tokens and routes are made up, no router takes part.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from tests import backends
from tests.backends import BACKENDS, load, promises
from tests.oracle import swiglu
from tests.ranks import Mode, RankContext, run_ranks
from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import DispatchLimits, DispatchMetadata, Routing, TokenDispatcher
from titan_moe.layer.experts import GroupedExperts
from titan_moe.layer.layout import TokenLayout

RANKS, E, D, F = 4, 8, 16, 8
EP_SIZES = (1, 2, 4)
WEIGHTS = ("w1_EFD", "w2_EDF", "w3_EFD")


class Outcome(NamedTuple):
    """An output and its gradients. Weight gradients are those of the local experts."""

    out_TD: Tensor
    x_TD: Tensor
    scores_TK: Tensor
    w1_EFD: Tensor
    w2_EDF: Tensor
    w3_EFD: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What one EP group computes: everything per EP rank, in rank order.

    Attributes:
        places: per rank, DispatchMetadata.of's arguments.
    """

    x_TD: list[Tensor]
    ids_TK: list[Tensor]
    scores_TK: list[Tensor]
    grad_TD: list[Tensor]
    weights: list[dict[str, Tensor]]
    places: list[dict[str, Any]]
    masked: bool = False  # picks whose id is -1 are masked

    def on_one_rank(self) -> "Problem":
        """The same tokens, rank after rank, and all experts, on a single rank."""
        num_tokens = sum(x_TD.shape[0] for x_TD in self.x_TD)
        place = {"local_batch_size": 1, "local_seq_len": num_tokens, "dim": D, "global_seq_len": num_tokens}
        return Problem(
            **{name: [torch.cat(getattr(self, name))] for name in ("x_TD", "ids_TK", "scores_TK", "grad_TD")},
            weights=[{name: torch.cat([w[name] for w in self.weights]) for name in WEIGHTS}],
            places=[place],
            masked=self.masked,
        )

    def to(self, rows: torch.dtype, scores: torch.dtype) -> "Problem":
        """The same numbers, rounded."""
        return dataclasses.replace(
            self,
            x_TD=[x.to(rows) for x in self.x_TD],
            scores_TK=[s.to(scores) for s in self.scores_TK],
            grad_TD=[g.to(rows) for g in self.grad_TD],
            weights=[{name: w.to(rows) for name, w in weights.items()} for weights in self.weights],
        )


# name: (B, L split over the EP ranks as torch.chunk does), K, who may be chosen. RAGGED is no such split:
# ranks of different data axes, the third of them without tokens.
RAGGED = (1, 4, 0, 3)
CASES: dict[str, tuple[tuple[int, ...], int, str]] = {
    "random": ((2, 9), 3, "any"),
    "empty_last_rank": ((2, 5), 2, "any"),  # 2, 2, 1, 0 positions over 4 ranks
    "empty_middle_rank": (RAGGED, 2, "any"),
    "idle_ranks": ((2, 8), 2, "last rank's"),
    "hot_expert": ((2, 8), 1, "expert 5"),
    "top1": ((3, 5), 1, "any"),
    "all_experts": ((1, 6), E, "any"),
    "no_tokens": ((2, 0), 2, "any"),
    "one_token": ((1, 1), 2, "any"),
    "one_token_per_rank": ((1, 4), 3, "any"),
    "masked_picks": ((2, 7), 3, "any or none"),
    "masked_rank": ((2, 8), 2, "none on the last rank"),
}


def limits(ep: int, *, top_k: int = 2, num_experts: int = E) -> DispatchLimits:
    return DispatchLimits(num_experts=num_experts, top_k=top_k, dim=D, ep_size=ep, num_max_tokens_per_rank=32)


def config(name: str, top_k: int = 2) -> Any:
    return backends.config(name, num_experts=E, top_k=top_k)


def unserved(name: str, ep: int) -> str:
    """Why this dispatcher does not serve this EP size here; empty if it does."""
    try:
        cls: Any = load(name)
        config(name).validate(limits(ep))
        config(name).build()
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "requires_ep" if cls.requires_ep and ep == 1 else ""


UNSERVED = {(name, ep): unserved(name, ep) for name in BACKENDS for ep in EP_SIZES}
SERVED = [pair for pair, reason in UNSERVED.items() if not reason]
on_served = pytest.mark.parametrize(("name", "ep"), SERVED)

# Real ranks take every case, and are the faster ones here; simulated ranks take a few and must agree.
SIMULATED = ("random", "empty_last_rank", "masked_picks")
MODES: dict[Mode, tuple[str, ...]] = {"gloo": tuple(CASES), "local_tensor": SIMULATED}
WHERE = [(name, ep, mode) for name, ep in SERVED for mode in MODES if ep > 1 or mode == "gloo"]
on_ranks = pytest.mark.parametrize(("name", "ep", "mode"), WHERE)
in_every_case = pytest.mark.parametrize(
    ("name", "ep", "mode", "case"), [(*where, case) for where in WHERE for case in MODES[where[2]]]
)


@functools.cache
def problem(case: str, ep: int, group: int = 0) -> Problem:
    """fp64, the same for every dispatcher."""
    shape, top_k, allowed = CASES[case]
    generator = torch.Generator().manual_seed(1000 * group + 10 * list(CASES).index(case) + ep)
    if shape is RAGGED:
        lengths = RAGGED[-ep:]
        places = [{"local_batch_size": 1, "local_seq_len": n, "global_seq_len": n} for n in lengths]
    else:
        batch, length = shape
        lengths = _chunk_sizes(length, ep)
        split = {"local_batch_size": batch, "global_seq_len": length, "sp_size": ep}
        places = [{"local_seq_len": n, "sp_rank": rank, **split} for rank, n in enumerate(lengths)]
    sizes = [place["local_batch_size"] * place["local_seq_len"] for place in places]
    allowed_ids = {
        "any": torch.arange(E),
        "any or none": torch.arange(E),
        "none on the last rank": torch.arange(E),
        "last rank's": torch.arange(E)[-E // max(EP_SIZES) :],
        "expert 5": torch.tensor([5]),
    }[allowed]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * size[-1] ** -0.5

    def choose(num_tokens: int) -> Tensor:
        order = torch.rand(num_tokens, len(allowed_ids), generator=generator).argsort(1)
        ids_TK = allowed_ids[order][:, :top_k].contiguous()
        if allowed == "any or none":
            ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.3] = -1
            ids_TK[::4] = -1  # tokens that go nowhere
        return ids_TK

    weights = {"w1_EFD": draw(E, F, D), "w2_EDF": draw(E, D, F), "w3_EFD": draw(E, F, D)}
    x_TD, ids_TK = [4 * draw(n, D) for n in sizes], [choose(n) for n in sizes]
    if allowed == "none on the last rank":
        ids_TK[-1].fill_(-1)
    return Problem(
        x_TD=x_TD,
        ids_TK=ids_TK,
        scores_TK=[torch.rand(n, top_k, generator=generator, dtype=torch.float64) + 0.1 for n in sizes],
        grad_TD=[draw(n, D) for n in sizes],
        weights=[{name: w.chunk(ep)[rank] for name, w in weights.items()} for rank in range(ep)],
        places=[{"dim": D, **place} for place in places],
        masked="none" in allowed,
    )


def _chunk_sizes(length: int, parts: int) -> list[int]:
    padded = -(-length // parts)
    return [min(max(length - rank * padded, 0), padded) for rank in range(parts)]


@functools.cache
def dense(case: str, ep: int, group: int) -> Outcome:
    """One token and one expert at a time, fp64; tokens in rank order."""
    one = problem(case, ep, group).on_one_rank()
    x_TD, scores_TK, *weights = (
        t.clone().requires_grad_() for t in (one.x_TD[0], one.scores_TK[0], *one.weights[0].values())
    )
    w1_EFD, w2_EDF, w3_EFD = weights
    out_TD = x_TD * 0
    for t, ids in enumerate(one.ids_TK[0].tolist()):
        for k, e in enumerate(ids):
            if e < 0:
                continue
            y_D = scores_TK[t, k] * swiglu(x_TD[t], w1_EFD[e], w2_EDF[e], w3_EFD[e])
            out_TD = out_TD.index_add(0, torch.tensor([t]), y_D.unsqueeze(0))
    leaves = (x_TD, scores_TK, *weights)
    gradients = torch.autograd.grad(out_TD, leaves, one.grad_TD[0], allow_unused=True, materialize_grads=True)
    return Outcome(out_TD.detach(), *gradients)


class OnRank:
    """One rank's part of a round of problems, one per EP group, and the dispatcher that serves it."""

    def __init__(
        self, ctx: RankContext, name: str, ep: int, groups: list[Problem], fault: str | None = None
    ) -> None:
        def own(pick: Callable[[Problem], list[Any]]) -> Any:
            return ctx.per_rank([value for group in groups for value in pick(group)])

        cls: Any = load(name)
        top_k = groups[0].ids_TK[0].shape[1]
        self.dispatcher: TokenDispatcher[Any] = (FAULTS[fault](cls) if fault else cls)(config(name, top_k))
        mesh = ctx.device_mesh((ctx.world_size // ep, ep), ("dp", "ep"))["ep"] if ep > 1 else None
        self.dispatcher.bind(mesh, limits(ep, top_k=top_k))
        self.x_TD = own(lambda group: group.x_TD).requires_grad_()
        self.ids_TK = own(lambda group: group.ids_TK)
        self.counts_E = own(
            lambda group: [torch.bincount(ids[ids >= 0], minlength=E) for ids in group.ids_TK]
        )
        self.present_TK = own(lambda group: [ids >= 0 for ids in group.ids_TK]) if groups[0].masked else None
        self.scores_TK = own(lambda group: group.scores_TK).requires_grad_()
        self.grad_TD = own(lambda group: group.grad_TD)
        self.experts: Any = GroupedExperts.Config(dim=D, hidden_dim=F, num_experts=E // ep).build()
        for weight in WEIGHTS:
            parameter = torch.nn.Parameter(own(lambda group, w=weight: [part[w] for part in group.weights]))
            setattr(self.experts, weight, parameter)
        names = groups[0].places[0]
        place = {n: own(lambda group, n=n: [part[n] for part in group.places]) for n in names}
        self.layout = TokenLayout(**place)

    def dispatch(self, x_TD: Tensor | None = None, scores_TK: Tensor | None = None) -> Any:
        scores_TK = self.scores_TK if scores_TK is None else scores_TK
        routing = Routing(scores_TK, self.ids_TK, self.counts_E, self.present_TK)
        return self.dispatcher.dispatch(self.x_TD if x_TD is None else x_TD, routing, self.layout)

    def forward(self, x_TD: Tensor | None = None, scores_TK: Tensor | None = None) -> Tensor:
        x_RD, counts_e, receipt = self.dispatch(x_TD, scores_TK)
        return self.dispatcher.combine(self.experts(x_RD, counts_e), receipt)

    def backward(self, out_TD: Tensor, **kwargs: Any) -> Outcome:
        weights = [getattr(self.experts, weight) for weight in WEIGHTS]
        leaves = [self.x_TD, self.scores_TK, *weights]
        return Outcome(out_TD.detach(), *torch.autograd.grad(out_TD, leaves, self.grad_TD, **kwargs))


def round_trips(
    ctx: RankContext, name: str, ep: int, rounds: dict[str, list[Problem]], fault: str | None = None
) -> dict[str, dict[str, Any]]:
    """Each round once, once more, recomputed, and combined twice; and where every row went."""
    results: dict[str, dict[str, Any]] = {}
    for case, groups in rounds.items():
        here = OnRank(ctx, name, ep, groups, fault)
        x_RD, counts_e, receipt = here.dispatch()
        y_RD = here.experts(x_RD, counts_e)
        first, second = here.dispatcher.combine(y_RD, receipt), here.dispatcher.combine(y_RD, receipt)
        recomputed = checkpoint(here.forward, here.x_TD, here.scores_TK, use_reentrant=False)
        selective = SelectiveAC.Config().build(dump_folder="")._wrap_block(Step(here))
        tags_RD = here.dispatch(x_TD=_tagged(ctx, groups)).x_RD
        results[case] = {
            "once": here.backward(first, retain_graph=True),
            "second combine": here.backward(second),
            "again": here.backward(here.forward()),
            "recomputed": here.backward(recomputed),
            "recomputed in part": here.backward(selective(here.x_TD, here.scores_TK)),
            "x_RD": x_RD,
            "counts_e": counts_e,
            "tags_R": tags_RD[:, 0],
        }
    return results


class Step(torch.nn.Module):
    """A module around OnRank.forward, for torchtitan's SelectiveAC: that keeps the all-to-alls' outputs."""

    def __init__(self, here: OnRank) -> None:
        super().__init__()
        self.here, self.experts = here, here.experts

    def forward(self, x_TD: Tensor, scores_TK: Tensor) -> Tensor:
        return self.here.forward(x_TD, scores_TK)


def _tagged(ctx: RankContext, groups: list[Problem]) -> Tensor:
    """Rows that say where they come from: 100 * source rank + local token."""
    rows = [
        (100.0 * rank + torch.arange(x_TD.shape[0], dtype=torch.float32)).unsqueeze(1).repeat(1, D)
        for group in groups
        for rank, x_TD in enumerate(group.x_TD)
    ]
    return ctx.per_rank(rows)


DTYPES = {
    "fp64": (torch.float64, torch.float64),
    "bf16": (torch.bfloat16, torch.float32),  # of rows and of scores
}


def groups(case: str, ep: int, dtype: str) -> list[Problem]:
    """A problem for each EP group; a single one when EP is off."""
    return [problem(case, ep, g).to(*DTYPES[dtype]) for g in range(RANKS // ep if ep > 1 else 1)]


def run(body: Callable[..., Any], ep: int, *args: Any, mode: Mode) -> list[Any]:
    """`body` on all ranks; in this process when EP is off."""
    if ep == 1:
        return [body(RankContext(0, 1, "gloo"), *args)]
    return run_ranks(body, RANKS, *args, mode=mode)


@functools.cache
def results(name: str, ep: int, dtype: str, mode: Mode, fault: str | None = None) -> list[dict[str, Any]]:
    """round_trips' answers by rank."""
    rounds = {case: groups(case, ep, dtype) for case in MODES[mode]}
    return run(round_trips, ep, name, ep, rounds, fault, mode=mode)


def by_group(ranks: list[dict[str, Any]], ep: int, case: str, key: str) -> list[Outcome]:
    """Outcomes of whole EP groups: tokens and experts in rank order."""
    parts = [rank[case][key] for rank in ranks]
    whole = [parts[first : first + ep] for first in range(0, len(parts), ep)]
    return [Outcome(*(torch.cat(field) for field in zip(*group, strict=True))) for group in whole]


def different_bits(a: Any, b: Any) -> list[str]:
    """Fields of two Outcomes that are not the same to the last bit, the sign of zero included."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        name
        for name, x, y in zip(a._fields, a, b, strict=True)
        if x.dtype != y.dtype
        or x.shape != y.shape
        or not torch.equal(x.contiguous().view(width[x.itemsize]), y.contiguous().view(width[y.itemsize]))
    ]


@pytest.mark.parametrize("ep", EP_SIZES)
def test_every_ep_size_is_served(ep: int) -> None:
    """Otherwise all of this file could be skipped without a word."""
    assert [name for name in BACKENDS if not unserved(name, ep)]


def test_the_cases_are_what_they_say() -> None:
    for ep in (2, 4):
        counts = {
            case: torch.stack(
                [torch.bincount(ids[ids >= 0], minlength=E) for ids in problem(case, ep).ids_TK]
            )
            for case in CASES
        }
        rows = {case: counts_SE.sum(0).view(ep, -1).sum(1).tolist() for case, counts_SE in counts.items()}
        tokens = {case: [x.shape[0] for x in problem(case, ep).x_TD] for case in CASES}
        assert rows["idle_ranks"][:-1] == [0] * (ep - 1)
        assert rows["idle_ranks"][-1] == 32
        assert counts["hot_expert"].sum(0).tolist() == [0] * 5 + [16] + [0] * 2
        assert tokens["empty_middle_rank"] == list(RAGGED[-ep:])
        assert (counts["all_experts"].sum(0) == 6).all()
        assert 0 < counts["masked_picks"].sum() < 3 * 14
        assert counts["masked_rank"][-1].sum() == 0
        assert sum(tokens["no_tokens"]) == 0
        assert tokens["one_token"] == [1] + [0] * (ep - 1)
    assert [x.shape[0] for x in problem("empty_last_rank", 4).x_TD] == [4, 4, 2, 0]


@in_every_case
def test_equals_a_dense_loop(name: str, ep: int, mode: Mode, case: str) -> None:
    for group, outcome in enumerate(by_group(results(name, ep, "fp64", mode), ep, case, "once")):
        expected = dense(case, ep, group)
        for field, got, want in zip(Outcome._fields, outcome, expected, strict=True):
            torch.testing.assert_close(
                got, want, rtol=1e-10, atol=1e-12, msg=lambda m, f=field, g=group: f"{f} of group {g}: {m}"
            )


def expected_rows(case: str, ep: int, group: int, rank: int) -> list[list[int]]:
    """Tags of the rows of each local expert: by source rank, then by local token."""
    ids = problem(case, ep, group).ids_TK
    per_rank = E // ep
    return [
        [100 * source + t for source in range(ep) for t, row in enumerate(ids[source].tolist()) if e in row]
        for e in range(rank * per_rank, (rank + 1) * per_rank)
    ]


def misplaced(name: str, ep: int, mode: Mode, fault: str | None = None) -> list[str]:
    """Cases in which a rank got other rows, or in another order, than the contract says."""
    wrong = []
    for rank, answer in enumerate(results(name, ep, "bf16", mode, fault)):
        for case in MODES[mode]:
            rows = expected_rows(case, ep, rank // ep, rank % ep)
            got = answer[case]
            assert got["counts_e"].dtype == torch.int64
            if (
                got["counts_e"].tolist() != [len(tags) for tags in rows]
                or got["tags_R"].tolist() != [tag for tags in rows for tag in tags]
                or got["x_RD"].shape != (sum(map(len, rows)), D)
            ):
                wrong.append(f"{case} on rank {rank}")
    return wrong


@on_ranks
def test_rows_are_in_canonical_order(name: str, ep: int, mode: Mode) -> None:
    assert misplaced(name, ep, mode) == []


@on_ranks
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("again", ["again", "second combine", "recomputed", "recomputed in part"])
def test_twice_gives_the_same_bits(name: str, ep: int, mode: Mode, dtype: str, again: str) -> None:
    """Output and every gradient: a second run, combine on a used receipt, both kinds of checkpointing."""
    for answer in results(name, ep, dtype, mode):
        for case, got in answer.items():
            assert different_bits(got["once"], got[again]) == [], case


@in_every_case
def test_bf16_has_the_bits_it_promises(name: str, ep: int, mode: Mode, case: str) -> None:
    """Those of the reference on one rank with the same tokens."""
    reference = promises(name)
    if reference is None:
        pytest.skip("promises no bits")
    for group, outcome in enumerate(by_group(results(name, ep, "bf16", mode), ep, case, "once")):
        one = problem(case, ep, group).to(*DTYPES["bf16"]).on_one_rank()
        here = OnRank(RankContext(0, 1, "gloo"), reference, 1, [one])
        assert different_bits(outcome, here.backward(here.forward())) == []


@in_every_case
def test_scores_gradient_stays_fp32(name: str, ep: int, mode: Mode, case: str) -> None:
    """fp32 in dtype and in value: a gradient that went through bf16 has at most 8 bits set."""
    for outcome in by_group(results(name, ep, "bf16", mode), ep, case, "once"):
        gradient = outcome.scores_TK
        assert outcome.out_TD.dtype == outcome.x_TD.dtype == outcome.w1_EFD.dtype == torch.bfloat16
        assert gradient.dtype == torch.float32
        assert not gradient.any() or not torch.equal(gradient, gradient.bfloat16().float())


@on_served
def test_receipt_is_frozen_and_keeps_the_layout(name: str, ep: int) -> None:
    frozen = run(receipt_fields, ep, name, ep, groups("random", ep, "fp64"), mode="gloo")
    for changed, missing in frozen:
        assert changed == [], "assignment must raise FrozenInstanceError"
        assert missing == [], "the receipt must carry the layout's numbers"


def receipt_fields(
    ctx: RankContext, name: str, ep: int, groups: list[Problem]
) -> tuple[list[str], list[str]]:
    """Fields of a receipt that can be assigned to, and fields of the layout that it does not repeat."""
    here = OnRank(ctx, name, ep, groups)
    receipt = here.dispatch().metadata
    assert isinstance(receipt, DispatchMetadata)
    changed = []
    for field in dataclasses.fields(receipt):
        try:
            setattr(receipt, field.name, None)
            changed.append(field.name)
        except dataclasses.FrozenInstanceError:
            pass
    layout = {name: value for name, value in vars(here.layout).items() if name != "source"}  # dispatch's own
    return changed, [n for n, value in layout.items() if getattr(receipt, n) != value]


@on_ranks
@pytest.mark.parametrize("backward_first", ["A", "B"])
def test_two_microbatches_in_flight(name: str, ep: int, mode: Mode, backward_first: str) -> None:
    a, b = groups("idle_ranks", ep, "bf16"), groups("empty_middle_rank", ep, "bf16")
    for answer in run(interleaved, ep, name, ep, a, b, backward_first, mode=mode):
        for batch, (in_flight, alone) in answer.items():
            assert different_bits(in_flight, alone) == [], batch


def interleaved(
    ctx: RankContext, name: str, ep: int, a: list[Problem], b: list[Problem], backward_first: str
) -> dict[str, tuple[Outcome, Outcome]]:
    """Dispatch A, dispatch B, combine B, combine A, backward; and each alone. One dispatcher serves both."""
    batches = {"A": OnRank(ctx, name, ep, a), "B": OnRank(ctx, name, ep, b)}
    shared = batches["B"].dispatcher = batches["A"].dispatcher
    dispatched = {key: batches[key].dispatch() for key in "AB"}
    out = {}
    for key in "BA":
        x_RD, counts_e, receipt = dispatched[key]
        out[key] = shared.combine(batches[key].experts(x_RD, counts_e), receipt)
    order = "AB" if backward_first == "A" else "BA"
    in_flight = {key: batches[key].backward(out[key]) for key in order}
    alone = {key: batches[key].backward(batches[key].forward()) for key in "AB"}
    return {key: (in_flight[key], alone[key]) for key in "AB"}


class Sent(TorchDispatchMode):
    """The rows and bytes that go into all-to-alls; without the counts, which are int64."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "all_to_all_single" and args[0].dtype != torch.int64:
            self.rows += args[0].shape[0] if args[0].shape[1:] == (D,) else 0
            self.bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def reported_and_sent(
    ctx: RankContext, name: str, ep: int, rounds: dict[str, list[Problem]]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    answers = {}
    for case, some in rounds.items():
        here = OnRank(ctx, name, ep, some)
        with Sent() as out:
            x_RD, _, receipt = here.dispatch()
        with Sent() as back:
            here.dispatcher.combine(x_RD, receipt)
        reported = here.dispatcher.traffic(receipt, x_RD.element_size())
        answers[case] = (tuple(reported), (out.rows, out.bytes, back.rows, back.bytes))
    return answers


@on_served
@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic_is_what_the_collectives_were_given(name: str, ep: int, dtype: str) -> None:
    rounds = {case: groups(case, ep, dtype) for case in CASES}
    ranks = run(reported_and_sent, ep, name, ep, rounds, mode="gloo")
    for rank in ranks:
        for case, (reported, sent) in rank.items():
            assert reported == sent, case
    assert (sum(sent[1] for _, sent in (rank["random"] for rank in ranks)) > 0) == (ep > 1)


class Scaled(NamedTuple):
    """An output and its gradients, where an "expert" multiplies each element of a row by its own constant.

    That rounds each element on its own, so that even fp32 has the same bits wherever a row lies in memory,
    which a matmul does not grant.
    """

    out_TD: Tensor
    x_TD: Tensor
    scores_TK: Tensor


def scaled_rows(
    ctx: RankContext, name: str, ep: int, some: list[Problem], factors: list[Tensor], fault: str | None
) -> Scaled:
    here = OnRank(ctx, name, ep, some, fault)
    x_RD, counts_e, receipt = here.dispatch()
    factors_e = ctx.per_rank(factors * len(some))
    factor_R = factors_e.repeat_interleave(counts_e, output_size=x_RD.shape[0])
    out_TD = here.dispatcher.combine(x_RD * factor_R.unsqueeze(1), receipt)
    gradients = torch.autograd.grad(out_TD, (here.x_TD, here.scores_TK), here.grad_TD)
    return Scaled(out_TD.detach(), *gradients)


def run_scaled(name: str, ep: int, some: list[Problem], fault: str | None = None) -> list[Scaled]:
    """By EP group, tokens in rank order."""
    factors = list(_factors(some[0].x_TD[0].dtype).chunk(ep))
    ranks = run(scaled_rows, ep, name, ep, some, factors, fault, mode="gloo")
    parts = [ranks[first : first + ep] for first in range(0, len(ranks), ep)]
    return [Scaled(*(torch.cat(field) for field in zip(*group, strict=True))) for group in parts]


def _factors(dtype: torch.dtype) -> Tensor:
    return torch.linspace(-1.5, 2.0, E).to(dtype)


class TestArithmetic:
    """fp32 products and sums in slot order, rounded once."""

    @on_served
    @pytest.mark.parametrize("rows", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
    def test_equals_the_explicit_loop(self, name: str, ep: int, rows: torch.dtype) -> None:
        """combine's sum, and that of a token's gradient, where bits are promised."""
        found = self._unlike_the_loop(name, ep, rows, "in slot order")
        promised = promises(name)
        assert found == set() or promised is None

    @on_served
    @pytest.mark.parametrize(
        ("rows", "how"), [(torch.bfloat16, "bf16 accumulator"), (torch.float32, "in reverse order")]
    )
    def test_the_loop_notices(self, name: str, ep: int, rows: torch.dtype, how: str) -> None:
        assert self._unlike_the_loop(name, ep, rows, how) == {"out_TD", "x_TD"}

    def _unlike_the_loop(self, name: str, ep: int, rows: torch.dtype, how: str) -> set[str]:
        """Output and token gradient, if they have other bits; never other numbers."""
        some = [group.to(rows, torch.float32) for group in groups("all_experts", ep, "fp64")]
        found = set()
        for got, group in zip(run_scaled(name, ep, some), some, strict=True):
            looped = dict(zip(("out_TD", "x_TD"), _loop(group.on_one_rank(), how), strict=True))
            for field, tensor in looped.items():
                torch.testing.assert_close(getattr(got, field), tensor, rtol=0.1, atol=0.1)
                if not torch.equal(getattr(got, field), tensor):
                    found.add(field)
        return found

    @on_served
    @pytest.mark.parametrize("case", ["all_experts", "random", "empty_last_rank"])
    def test_fp32_has_the_bits_it_promises(self, name: str, ep: int, case: str) -> None:
        """Both ways, gradients included."""
        assert self._fp32_fields(name, ep, case) == []

    @on_served
    def test_another_slot_order_has_other_bits(self, name: str, ep: int) -> None:
        assert self._fp32_fields(name, ep, "all_experts", "reversed_slots") == ["out_TD", "x_TD"]

    def _fp32_fields(self, name: str, ep: int, case: str, fault: str | None = None) -> list[str]:
        reference = promises(name)
        if reference is None:
            pytest.skip("promises no bits")
        some = [group.to(torch.float32, torch.float32) for group in groups(case, ep, "fp64")]
        expected = [run_scaled(reference, 1, [group.on_one_rank()])[0] for group in some]
        got = run_scaled(name, ep, some, fault)
        found = [different_bits(a, b) for a, b in zip(got, expected, strict=True)]
        return sorted({field for fields in found for field in fields})


def _loop(one: Problem, how: str) -> tuple[Tensor, Tensor]:
    """The output and the tokens' gradient of scaled rows."""
    x_TD, scores_TK, grad_TD = one.x_TD[0], one.scores_TK[0], one.grad_TD[0]
    factors_TK1 = _factors(x_TD.dtype)[one.ids_TK[0]].unsqueeze(2)
    accumulate = torch.bfloat16 if how == "bf16 accumulator" else torch.float32
    out_TD, x_grad_TD = (torch.zeros(x_TD.shape, dtype=accumulate) for _ in range(2))
    slots = range(scores_TK.shape[1])
    for k in reversed(slots) if how == "in reverse order" else slots:
        score_T1, factor_T1 = scores_TK[:, k, None], factors_TK1[:, k]
        row_grad_TD = (grad_TD.float() * score_T1).to(x_TD.dtype) * factor_T1
        out_TD = out_TD + ((x_TD * factor_T1).float() * score_T1).to(accumulate)
        x_grad_TD = x_grad_TD + row_grad_TD.to(accumulate)
    return out_TD.to(x_TD.dtype), x_grad_TD.to(x_TD.dtype)


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: reads of values, and sizes that hang on values."""

    OPS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        boolean_index = name.startswith("index") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for i in arg
        )
        counted_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in self.OPS or boolean_index or counted_size:
            self.seen.append(name)
        return func(*args, **kwargs)

    @contextmanager
    def counting(self) -> Iterator[list[str]]:
        """Also what a CPU tensor does without an operator: tolist, numpy, cpu, to("cpu")."""
        first = len(self.seen)
        plain = {name: getattr(Tensor, name) for name in ("tolist", "numpy", "cpu", "to")}

        def patched(name: str) -> Callable[..., Any]:
            def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                devices = [str(a) for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device))]
                if name != "to" or "cpu" in devices:
                    self.seen.append(name)
                return plain[name](tensor, *args, **kwargs)

            return call

        mine: list[str] = []
        with mock.patch.multiple(Tensor, **{name: patched(name) for name in plain}), self:
            yield mine
        mine += self.seen[first:]


def host_reads(
    ctx: RankContext, name: str, ep: int, groups: list[Problem], fault: str | None = None
) -> dict[str, list[str]]:
    here = OnRank(ctx, name, ep, groups, fault)
    here.forward()  # the first call may do once-only work
    reads = HostReads()
    with reads.counting() as dispatch:
        x_RD, counts_e, receipt = here.dispatch()
    y_RD = here.experts(x_RD, counts_e)
    with reads.counting() as combine:
        out_TD = here.dispatcher.combine(y_RD, receipt)
    with reads.counting() as backward:
        here.backward(out_TD)
    return {"dispatch": dispatch, "combine": combine, "backward": backward}


class TestHostSyncs:
    @on_served
    def test_only_the_declared_one(self, name: str, ep: int) -> None:
        cls: Any = load(name)
        for seen in run(host_reads, ep, name, ep, groups("random", ep, "bf16"), mode="gloo"):
            assert len(seen["dispatch"]) <= int(cls.needs_host_sync), seen
            assert seen["combine"] == seen["backward"] == []

    @pytest.mark.parametrize("name", BACKENDS)
    def test_the_fact_is_no_excuse(self, name: str) -> None:
        """A dispatcher that declares a host sync has one on the largest EP size it serves."""
        served = [ep for ep in EP_SIZES if not unserved(name, ep)]
        if not served:
            pytest.skip(unserved(name, EP_SIZES[-1]))
        ep = served[-1]
        seen = run(host_reads, ep, name, ep, groups("random", ep, "bf16"), mode="gloo")
        cls: Any = load(name)
        assert {len(rank["dispatch"]) for rank in seen} == {int(cls.needs_host_sync)}

    @on_served
    def test_a_read_in_combine_is_counted(self, name: str, ep: int) -> None:
        some = groups("random", ep, "bf16")
        for seen in run(host_reads, ep, name, ep, some, "reading_combine", mode="gloo"):
            assert len(seen["combine"]) == 5, seen

    def test_ordinary_operators_are_not_counted(self) -> None:
        x = torch.arange(6.0)
        with HostReads().counting() as seen:
            x.to(torch.bfloat16).float().add(x).index_select(0, torch.tensor([1, 2]))
            x[torch.tensor([1, 2])].repeat_interleave(torch.tensor([1, 2]), output_size=3)
        assert seen == []


# Faults: subclasses that break one promise each.


def _reversed_rows(cls: Any) -> Any:
    class Reversed(cls):  # results are right, the order inside an expert is not
        def dispatch(self, x_TD: Tensor, routing: Routing, layout: TokenLayout) -> Any:
            sent = super().dispatch(x_TD, routing, layout)
            counts_e = sent.num_tokens_per_local_expert_e
            num_rows = sent.x_RD.shape[0]
            ends_R = counts_e.cumsum(0).repeat_interleave(counts_e, output_size=num_rows)
            starts_R = (counts_e.cumsum(0) - counts_e).repeat_interleave(counts_e, output_size=num_rows)
            self.order_R = starts_R + ends_R - 1 - torch.arange(num_rows)
            return sent._replace(x_RD=sent.x_RD.index_select(0, self.order_R))

        def combine(self, y_RD: Tensor, metadata: Any) -> Tensor:
            return super().combine(y_RD.index_select(0, self.order_R), metadata)

    return Reversed


def _reversed_slots(cls: Any) -> Any:
    class Reversed(cls):  # the K addends of a token, and of its gradient, the other way round
        def dispatch(self, x_TD: Tensor, routing: Routing, layout: TokenLayout) -> Any:
            assert routing.present_TK is None
            slots = {
                "topk_scores_TK": routing.topk_scores_TK,
                "topk_expert_ids_TK": routing.topk_expert_ids_TK,
            }
            flipped = routing._replace(**{name: tensor.flip(1) for name, tensor in slots.items()})
            return super().dispatch(x_TD, flipped, layout)

    return Reversed


def _mutating_combine(cls: Any) -> Any:
    class Mutating(cls):
        def combine(self, y_RD: Tensor, metadata: Any) -> Tensor:
            out_TD = super().combine(y_RD, metadata)
            y_RD.data.mul_(2)  # as a combine that works in place of its input would
            return out_TD

    return Mutating


def _stateful(cls: Any) -> Any:
    class Stateful(cls):
        def dispatch(self, x_TD: Tensor, routing: Routing, layout: TokenLayout) -> Any:
            sent = super().dispatch(x_TD, routing, layout)
            self.metadata = sent.metadata
            return sent

        def combine(self, y_RD: Tensor, metadata: Any) -> Tensor:
            return super().combine(y_RD, self.metadata)

    return Stateful


def _reading_combine(cls: Any) -> Any:
    class Reading(cls):
        def combine(self, y_RD: Tensor, metadata: Any) -> Tensor:
            ones = torch.ones(3)
            ones.sum().item()
            ones.tolist()
            ones[ones > 0]
            ones.nonzero()
            ones.to("cpu")
            return super().combine(y_RD, metadata)

    return Reading


FAULTS: dict[str, Callable[[Any], Any]] = {
    "reversed_rows": _reversed_rows,
    "reversed_slots": _reversed_slots,
    "mutating_combine": _mutating_combine,
    "stateful": _stateful,
    "reading_combine": _reading_combine,
}


class TestPlantedFaults:
    """The checks above must fail on these."""

    @on_served
    def test_another_order_is_noticed(self, name: str, ep: int) -> None:
        wrong = misplaced(name, ep, "gloo", "reversed_rows")
        assert [case for case in wrong if case.startswith("random")]
        ranks = results(name, ep, "fp64", "gloo", "reversed_rows")
        for group, outcome in enumerate(by_group(ranks, ep, "random", "once")):
            torch.testing.assert_close(
                outcome.out_TD, dense("random", ep, group).out_TD, rtol=1e-10, atol=1e-12
            )

    @on_served
    def test_a_mutating_combine_is_noticed(self, name: str, ep: int) -> None:
        ranks = results(name, ep, "bf16", "gloo", "mutating_combine")
        pairs = [(rank["random"]["once"], rank["random"]["second combine"]) for rank in ranks]
        found = [different_bits(once, second) for once, second in pairs if once.out_TD.numel()]
        assert all("out_TD" in fields for fields in found), found

    @on_served
    def test_state_between_calls_is_noticed(self, name: str, ep: int) -> None:
        a = groups("idle_ranks", ep, "bf16")
        # As many rows in both, or the fault ends in an error instead of wrong numbers.
        b = [dataclasses.replace(group, ids_TK=[ids.flip(1) for ids in group.ids_TK]) for group in a]
        for fault, wrong in ((None, False), ("stateful", True)):
            answers = run(in_flight_outputs, ep, name, ep, a, b, fault, mode="gloo")
            for in_flight, alone in answers:
                assert (not torch.equal(in_flight, alone)) == (wrong and in_flight.shape[0] > 0)


def in_flight_outputs(
    ctx: RankContext, name: str, ep: int, a: list[Problem], b: list[Problem], fault: str | None
) -> tuple[Tensor, Tensor]:
    """A's output with B dispatched in between, and alone."""
    here, other = OnRank(ctx, name, ep, a, fault), OnRank(ctx, name, ep, b, fault)
    other.dispatcher = here.dispatcher
    x_RD, counts_e, receipt = here.dispatch()
    other.dispatch()
    in_flight = here.dispatcher.combine(here.experts(x_RD, counts_e), receipt)
    return in_flight, here.forward()


class TestClassFacts:
    @pytest.mark.parametrize("name", BACKENDS)
    def test_requires_ep_says_whether_ep_off_is_refused(self, name: str) -> None:
        try:
            cls: Any = load(name)
        except ImportError as error:
            pytest.skip(str(error))
        refused = False
        try:
            config(name).validate(limits(1))
            config(name).build().bind(None, limits(1))
        except ValueError:
            refused = True
        assert refused == cls.requires_ep

    @pytest.mark.parametrize(("name", "ep"), [pair for pair, reason in UNSERVED.items() if reason])
    def test_a_refusal_names_the_degree(self, name: str, ep: int) -> None:
        reason = UNSERVED[name, ep]
        if "Import" in reason or "ModuleNotFound" in reason:
            pytest.skip(reason)
        assert reason == "requires_ep" or f"expert_parallel_degree ({ep})" in reason

    @pytest.mark.parametrize("name", BACKENDS)
    def test_experts_that_do_not_divide_are_refused(self, name: str) -> None:
        try:
            load(name)
        except ImportError as error:
            pytest.skip(str(error))
        with pytest.raises(ValueError, match=r"expert_parallel_degree \(4\)"):
            backends.config(name, num_experts=6, top_k=2).validate(limits(4, num_experts=6))

    @pytest.mark.parametrize("name", BACKENDS)
    def test_bits_are_promised_of_a_dispatcher_that_needs_no_ep(self, name: str) -> None:
        try:
            load(name)
        except ImportError as error:
            pytest.skip(str(error))
        promised = promises(name)
        assert promised is None or not unserved(promised, 1)

    def test_unknown_name(self) -> None:
        first, *_ = dispatch.DISPATCHERS
        there = ", ".join(dispatch.DISPATCHERS)
        with pytest.raises(ValueError, match=rf"there are: {there}.*did you mean '{first}'"):
            dispatch.load(first + "l")


def sent_backward(ctx: RankContext, name: str, ep: int, some: list[Problem]) -> dict[str, int]:
    """Bytes that go into all-to-alls after the forward, by recomputation mode."""
    sent = {}
    for mode, wrap in {
        "none": lambda step: step,
        "selective": SelectiveAC.Config().build(dump_folder="")._wrap_block,
        "full": FullAC.Config().build(dump_folder="")._wrap_block,
    }.items():
        here = OnRank(ctx, name, ep, some)
        out_TD = wrap(Step(here))(here.x_TD, here.scores_TK)
        with Sent() as after:
            here.backward(out_TD)
        sent[mode] = after.bytes
    return sent


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "local"])
def test_selective_recomputation_sends_nothing_again(name: str) -> None:
    """Full recomputation dispatches again; what selective saves, it does not send twice."""
    for sent in run(sent_backward, 2, name, 2, groups("random", 2, "bf16"), mode="gloo"):
        assert sent["selective"] == sent["none"] > 0
        assert sent["full"] > sent["none"]
