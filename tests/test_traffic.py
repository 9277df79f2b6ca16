"""What dispatchers send: the closed form, real rows against it, and the counters behind metrics.jsonl."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import backends, layers
from tests.backends import BACKENDS, load
from tests.layers import Mesh
from tests.oracle import Case, random_case
from tests.ranks import RankContext, run_ranks
from tests.test_layering import ROOT
from titan_moe.bench import dispatcher_traffic as bench
from titan_moe.bench.dispatchers import closed_form, facts
from titan_moe.layer.dispatch.base import DispatchLimits, Routing, Traffic
from titan_moe.layer.dispatch.uniform import ranks_per_token
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.load_balance import LoadBalancer
from titan_moe.trainer.load_report import traffic_report

OVER_EP = [name for name in BACKENDS if load(name).needs_host_sync]


def enumerated(num_experts: int, top_k: int, ep_size: int, groups: int, used: int) -> float:
    """Ranks per token, over every choice of groups and of experts in them, one by one."""
    size, per_rank = num_experts // groups, num_experts // ep_size
    means = []
    for chosen in itertools.combinations(range(groups), used):
        allowed = [expert for expert in range(num_experts) if expert // size in chosen]
        reached = [len({e // per_rank for e in ids}) for ids in itertools.combinations(allowed, top_k)]
        means.append(sum(reached) / len(reached))
    return sum(means) / len(means)


class TestClosedForm:
    @pytest.mark.parametrize("ep_size", [1, 2, 4, 8])
    @pytest.mark.parametrize("top_k", [1, 2, 3, 8])
    def test_equals_counting(self, top_k: int, ep_size: int) -> None:
        assert ranks_per_token(8, top_k, ep_size) == pytest.approx(enumerated(8, top_k, ep_size, 1, 1))

    @pytest.mark.parametrize(("groups", "used"), [(2, 1), (3, 2), (4, 2), (6, 3), (6, 6)])
    @pytest.mark.parametrize("ep_size", [2, 3, 4, 6, 12])
    def test_equals_counting_with_groups(self, groups: int, used: int, ep_size: int) -> None:
        """Ranks that hold whole groups, parts of one, and parts of two."""
        got = ranks_per_token(12, 2, ep_size, num_expert_groups=groups, num_limited_groups=used)
        assert got == pytest.approx(enumerated(12, 2, ep_size, groups, used))

    def test_groups_matter(self) -> None:
        assert ranks_per_token(12, 2, 4, num_expert_groups=4, num_limited_groups=1) == 1.0
        assert ranks_per_token(12, 2, 4) > 1.5


def rows_sent(ctx: RankContext, name: str, chunks: int, chunk: int, dim: int) -> list[int]:
    """All ranks' traffic for ``chunks`` times ``chunk`` uniformly routed tokens per rank."""
    dispatcher = backends.config(name, num_experts=bench.NUM_EXPERTS, top_k=bench.TOP_K).build()
    limits = DispatchLimits(
        num_experts=bench.NUM_EXPERTS,
        top_k=bench.TOP_K,
        dim=dim,
        ep_size=ctx.world_size,
        num_max_tokens_per_rank=chunk,
    )
    dispatcher.bind(ctx.device_mesh((ctx.world_size,), ("ep",)), limits)
    generator = torch.Generator().manual_seed(ctx.rank)
    sent = [bench.send_chunk(dispatcher, generator, chunk, dim) for _ in range(chunks)]
    return torch.tensor(sent).sum(0).tolist()


@functools.cache
def of_100k_tokens(name: str) -> Traffic:
    ranks = run_ranks(rows_sent, 4, name, 25, 1000, bench.DIM, timeout_s=180)
    return Traffic(*torch.tensor(ranks).sum(0).tolist())


class TestUniformRouting:
    """E 64, K 8, EP 4, 100,000 tokens, rows of 2048 bf16."""

    @pytest.mark.parametrize("name", OVER_EP)
    def test_bytes_follow_the_closed_form(self, name: str) -> None:
        cls: Any = load(name)
        limits = DispatchLimits(num_experts=64, top_k=8, dim=2048, ep_size=4, num_max_tokens_per_rank=1000)
        rows = backends.config(name, num_experts=64, top_k=8).build().uniform_rows_per_token(limits)
        sent = of_100k_tokens(name)
        plain = 100_000 * 8 * 2048 * 2  # all_to_all's bytes, one way
        for got, expected in zip((sent.dispatch_bytes, sent.combine_bytes), rows, strict=True):
            assert got / plain == pytest.approx(expected / 8, rel=0.01), cls

    def test_one_row_per_rank_halves_both_ways(self) -> None:
        fewest = min(sum(of_100k_tokens(name)) for name in OVER_EP)
        sent = next(s for name in OVER_EP if sum(s := of_100k_tokens(name)) == fewest)
        plain = 100_000 * 8 * 2048 * 2
        assert sent.dispatch_bytes <= 0.5 * plain
        assert sent.combine_bytes <= 0.5 * plain


GROUPS, USED = 8, 2


def rows_sent_in_groups(ctx: RankContext, name: str) -> list[int]:
    """2,000 tokens per rank, each in 2 of 8 groups of 8 experts: this rank's rows out and back."""
    dispatcher = backends.config(name, num_experts=64, top_k=8).build()
    limits = DispatchLimits(
        num_experts=64, top_k=8, dim=16, ep_size=ctx.world_size, num_max_tokens_per_rank=2000
    )
    dispatcher.bind(ctx.device_mesh((ctx.world_size,), ("ep",)), limits)
    generator = torch.Generator().manual_seed(ctx.rank)
    groups_TG = torch.rand(2000, GROUPS, generator=generator).topk(USED).indices
    drawn_TK = torch.rand(2000, USED * 8, generator=generator).topk(8).indices
    ids_TK = groups_TG.gather(1, drawn_TK // 8) * 8 + drawn_TK % 8
    routing = Routing(torch.ones(2000, 8), ids_TK, torch.bincount(ids_TK.flatten(), minlength=64))
    layout = TokenLayout(local_batch_size=1, local_seq_len=2000, dim=16, global_seq_len=2000)
    sent = dispatcher.dispatch(torch.ones(2000, 16), routing, layout)
    traffic = dispatcher.traffic(sent.metadata, 4)
    return [traffic.dispatch_rows, traffic.combine_rows]


@pytest.mark.parametrize("name", OVER_EP)
def test_rows_of_group_limited_routing_follow_the_closed_form(name: str) -> None:
    limits = DispatchLimits(
        num_experts=64,
        top_k=8,
        dim=16,
        ep_size=4,
        num_max_tokens_per_rank=2000,
        num_expert_groups=GROUPS,
        num_limited_groups=USED,
    )
    expected = backends.config(name, num_experts=64, top_k=8).build().uniform_rows_per_token(limits)
    sent = torch.tensor(run_ranks(rows_sent_in_groups, 4, name)).sum(0) / 8000
    assert sent.tolist() == pytest.approx(expected, rel=0.01)
    assert ranks_per_token(64, 8, 4) > 1.5 * ranks_per_token(
        64, 8, 4, num_expert_groups=GROUPS, num_limited_groups=USED
    )


def counted(ctx: RankContext, case: Case, dispatcher: str, ac: bool) -> dict[str, float]:
    """Two training forwards and backwards and one eval forward, as the balancer reports them."""
    mesh = Mesh(tp=2, ep=4)
    dims = layers.parallel_dims(ctx, mesh)
    layer: Any = layers.on_mesh(layers.build_layer(case, dispatcher), dims, mesh)
    for _ in range(2):
        x_BLD = layers.placed(layers.local_rows(case.params["x_BLD"], ctx.rank // 2, dims), dims, mesh)
        out_BLD = checkpoint(layer, x_BLD, use_reentrant=False) if ac else layer(x_BLD)
        out_BLD.to_local().square().sum().backward()
    layer.eval()
    layer(x_BLD)
    balancer = LoadBalancer([nn.ModuleDict({"moe": layer})], dims)
    balancer.step()
    assert not layer.traffic.any()
    return traffic_report(balancer)


class TestCounters:
    @pytest.mark.parametrize("name", OVER_EP)
    def test_once_per_training_forward(self, name: str) -> None:
        case = random_case(3, 4, 7, 16, 8, 8, 3)
        plain = run_ranks(counted, 4, case, name, False)
        assert plain == run_ranks(counted, 4, case, name, True), "recomputation was counted"
        assert all(rank == plain[0] for rank in plain), "the ranks do not agree"
        report = plain[0]
        assert report["tokens"] == 2 * 4 * 7
        assert 1 * report["tokens"] <= report["dispatch_rows"] <= 3 * report["tokens"]
        assert report["dispatch_rows_if_uniform"] <= 3 * report["tokens"]
        assert report["combine_bytes"] == report["combine_rows"] * 16 * 8

    def test_without_ep_nothing_is_sent(self) -> None:
        case = random_case(3, 2, 7, 16, 8, 8, 3)
        layer = layers.build_layer(case)
        layer(case.params["x_BLD"])
        alone = SimpleNamespace(dp_cp_enabled=False, tp_enabled=False, ep_enabled=False)
        balancer = LoadBalancer([nn.ModuleDict({"moe": layer})], alone)
        balancer.step()
        assert traffic_report(balancer) == Traffic()._asdict() | {
            "tokens": 14,
            "dispatch_rows_if_uniform": 0,
            "combine_rows_if_uniform": 0,
        }


class TestTables:
    def test_every_dispatcher_and_variant_has_a_line(self) -> None:
        head, *lines = facts()
        assert len(lines) == len(BACKENDS)
        assert all(len(line) == len(head) and all(line) for line in lines)

    def test_closed_form_reads(self) -> None:
        _, first, *_ = closed_form()
        assert first == ("E 64, K 8", "0.249", "0.457", "0.679", "0.844", "0.944", "1.000")

    def test_docs_hold_what_the_command_prints(self) -> None:
        from titan_moe.bench.dispatchers import markdown

        text = (ROOT / "docs" / "dispatchers.md").read_text(encoding="utf-8")
        assert markdown(facts()) in text
        assert markdown(closed_form()) in text
