"""The bench: counters on work whose bytes are known, turns, the check of the layers, and the command."""

import dataclasses
import json
import math
import xml.dom.minidom
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import RankContext, run_ranks
from titan_moe.bench import __main__ as bench
from titan_moe.bench import bandwidth, ep, interleave, plot, shapes, targets, wire
from titan_moe.bench.bytes_moved import ByteCounter, UnseenWrite
from titan_moe.bench.contestants import (
    LAYERS,
    OURS,
    STOCK,
    DifferentLayers,
    Floor,
    Problem,
    check_same,
    stock,
)
from titan_moe.bench.memory import peak_bytes, saved_bytes
from titan_moe.bench.report import BenchSettings
from titan_moe.bench.shapes import Shape, least_bytes

TINY = Shape(32, 32, 16, 4, 2)
x_AB = torch.ones(10, 20)  # 800 bytes
ids_C = torch.arange(5)  # 40 bytes


def in_place() -> None:
    x_AB.clone().add_(x_AB)


# Work, and the bytes that it reads and writes.
KNOWN: dict[str, tuple[Callable[[], object], int]] = {
    "out of place": (lambda: x_AB + 1, 2 * 800),
    "two tensors": (lambda: x_AB + x_AB.clone(), 2 * 800 + 3 * 800),
    "one tensor twice": (lambda: x_AB * x_AB, 2 * 800),
    "in place: its target is read and written": (in_place, 2 * 800 + 3 * 800),
    "a copy into another dtype": (lambda: x_AB.bfloat16(), 800 + 400),
    "views are free": (lambda: x_AB.t().unsqueeze(0)[:, 1:].detach().view(19, 10), 0),
    "an allocation is free": (lambda: torch.empty_like(x_AB).new_empty(3), 0),
    "zeros are written, not read": (lambda: torch.zeros_like(x_AB), 800),
    "an expanded tensor is what is stored": (lambda: x_AB[:, :1].expand(10, 999) + 0.0, 800 + 4 * 9990),
    "a GEMM is free, what is around it is not": (lambda: (x_AB @ x_AB.t()).relu(), 400 + 400),
    "rows picked": (lambda: x_AB.index_select(0, ids_C), 800 + 40 + 400),
    "two results": (lambda: x_AB.flatten().sort(), 800 + 800 + 1600),
    "into out=": (lambda: torch.add(x_AB, 1, out=torch.empty(10, 20)), 2 * 800),
}


@pytest.mark.parametrize(("work", "moved"), KNOWN.values(), ids=KNOWN)
def test_bytes_of_known_ops(work: Callable[[], object], moved: int) -> None:
    with ByteCounter([x_AB, ids_C]) as counter:
        work()
    assert counter.total == moved


def test_backward_is_counted_too() -> None:
    x = torch.ones(10, 20, requires_grad=True)
    with ByteCounter([x, x_AB]) as counter:
        x.sin().backward(x_AB)
    assert counter.by_op == {"aten::sin": 1600, "aten::cos": 1600, "aten::mul": 2400}


def test_a_custom_op_is_one_op() -> None:
    @torch.library.custom_op("titan_moe_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + x).neg().neg()

    with ByteCounter([x_AB]) as counter:
        twice(x_AB)
    assert counter.by_op == {"titan_moe_test::twice": 1600}


def test_a_write_behind_the_dispatcher_is_found() -> None:
    def hidden() -> torch.Tensor:
        made = torch.empty(10, 20)
        np.copyto(made.numpy(), 1.0)
        return made + 1

    with pytest.raises(UnseenWrite, match=r"aten::add reads \(10, 20\)"), ByteCounter([x_AB]):
        hidden()


def test_a_storage_that_took_a_dead_ones_place_is_not_taken_for_written() -> None:
    with ByteCounter([]) as counter:
        for _ in range(20):
            torch.zeros(10, 20)  # gone at once: the next one may get its address
            with pytest.raises(UnseenWrite):
                torch.empty(10, 20).neg()
    assert set(counter.by_op) == {"aten::zeros"}


def test_kernels_move_what_their_bandwidth_is_counted_from() -> None:
    with ByteCounter([]) as counter:
        for name, kernel in bandwidth.launches(TINY).items():
            before = counter.total
            kernel.launch()
            if name != bandwidth.COPY:  # in place: the counter takes its target for read, too
                assert counter.total - before == kernel.moved, name


class TestMemory:
    def test_saved_bytes_of_a_known_function(self) -> None:
        x, w = torch.ones(10, 20, requires_grad=True), torch.ones(20, 30, requires_grad=True)

        def forward() -> torch.Tensor:
            return (x @ w).exp().sin()  # x and w; exp's result, for exp and for sin

        assert saved_bytes(forward, inputs=[x], parameters=[w]) == 800 + 1200
        assert saved_bytes(forward, inputs=[x]) == 800 + 1200 + 2400

    def test_an_input_counts_when_it_is_not_saved_and_a_view_counts_whole(self) -> None:
        x = torch.ones(10, 20, requires_grad=True)
        assert saved_bytes(lambda: x + 1, inputs=[x]) == 800
        assert saved_bytes(lambda: x[:, :5].t().sin(), inputs=[]) == 800

    def test_what_is_dropped_before_backward_is_not_saved(self) -> None:
        x = torch.ones(10, 20, requires_grad=True)

        def forward() -> torch.Tensor:
            x.cos().exp()
            return x.sin()

        assert saved_bytes(forward) == 800

    def test_peak_bytes_of_a_known_function(self) -> None:
        def work() -> None:
            a = torch.ones(1000)  # 4000
            b = a + 1  # 8000
            del a
            b.add_(1)
            torch.cat([b, b])  # 12000, and gone

        assert [peak_bytes(work) for _ in range(3)] == [12000] * 3

    def test_peak_sees_what_an_op_takes_for_itself(self) -> None:
        x = torch.rand(1000)
        assert peak_bytes(lambda: torch.median(x)) >= 4000  # a copy that no caller ever holds


def test_turns_are_taken_and_warmup_is_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ticks = iter(range(100))

    @dataclasses.dataclass
    class Named:
        name: str

        def run(self) -> None:
            said.append(self.name)

        def clear(self) -> None:
            said.append(".")

    def seconds(work: Callable[[], None]) -> float:
        work()
        return next(ticks)

    monkeypatch.setattr(interleave.clock, "seconds", seconds)
    found = interleave.interleaved({"A": Named("A"), "B": Named("B")}, repeats=2, warmup=1)
    assert "".join(said).replace(".", "") == "BAABBA"
    assert "".join(said) == ".B..A." + ".A..B." + ".B..A."
    assert found == {"A": [2, 5], "B": [3, 4]}


def test_ratios_are_of_neighbours() -> None:
    assert interleave.ratio([2, 20, 400], [1, 10, 100]) == (2, 2, 3)
    assert interleave.geometric_mean([1, 4]) == pytest.approx(2)
    assert interleave.spread([3]) == (3, 3, 3)


def test_the_ratio_of_sums_has_the_standard_error_of_the_pairs() -> None:
    estimate = interleave.total_ratio([2, 9], [1, 3])
    assert estimate == (11 / 4, pytest.approx(0.5))
    assert estimate.show(1) == "2.8 ± 0.5"
    assert math.isnan(interleave.total_ratio([2], [1]).error)


class TestContestants:
    def test_all_layers_choose_the_drawn_experts_and_agree(self) -> None:
        problem = Problem.draw(TINY)
        runs = {name: problem.run(build) for name, build in LAYERS.items()}
        assert {p.dtype for run in runs.values() for p in run.layer.parameters()} == {torch.bfloat16}
        assert torch.equal(runs[STOCK].results()["ids"], problem.ids_TK.sort(-1).values)
        for name in runs.keys() - {STOCK}:
            assert check_same(runs[STOCK], runs[name]).keys() >= {"out", "x", "router.gate.weight"}

    def test_a_wrong_layer_is_found(self) -> None:
        problem = Problem.draw(TINY)
        right, wrong = problem.run(stock), problem.run(LAYERS[OURS])
        experts: Any = wrong.layer.routed_experts.inner_experts
        experts.w1_EFD.data[0] *= 1.1
        with pytest.raises(DifferentLayers, match="relative distances"):
            check_same(right, wrong)

    def test_other_routes_are_found(self) -> None:
        problem = Problem.draw(TINY)
        right, wrong = problem.run(stock), problem.run(LAYERS[OURS])
        wrong.layer.router.gate.weight.data.copy_(wrong.layer.router.gate.weight.roll(1, 0))  # type: ignore[union-attr]
        with pytest.raises(DifferentLayers, match="different experts"):
            check_same(right, wrong)

    def test_the_floor_makes_the_calls_that_the_layer_makes(self) -> None:
        problem = Problem.draw(TINY)
        assert gemms(Floor(problem).run) == gemms(problem.run(stock).run)


def gemms(work: Callable[[], None]) -> list[Any]:
    """The grouped matmuls, with the layouts and offsets that they are called with."""
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name == "aten::_grouped_mm":
                a, b, offsets = args
                seen.append((tuple(a.shape), a.stride(), tuple(b.shape), b.stride(), offsets.tolist()))
            return func(*args, **(kwargs or {}))

    with Watch():
        work()
    assert len(seen) == 9
    return sorted(seen)


def timed_and_counted(ctx: RankContext) -> list[Any]:
    """The parts ep and wire, on the ranks of a pool."""
    return [ep.times_on_rank([TINY], 1)[str(TINY)], wire.bytes_on_rank([TINY])[str(TINY)]]


def test_over_ranks() -> None:
    """Receipts are what the collectives were given, but for the counts: 8 bytes per expert and rank."""
    (timed, sent), (_, seen_by_other) = run_ranks(timed_and_counted, 2)
    assert timed["distance_from_stock"].keys() == timed["seconds"].keys() - {STOCK}
    assert all(len(seconds) == 1 for seconds in timed["seconds"].values())
    assert sent == seen_by_other, "summed over ranks"
    counts = 2 * TINY.E * 8
    rows = 2 * 2 * TINY.N * TINY.D * 2  # of both ranks, both ways, bf16
    assert sent[STOCK] == {"receipts": 0, "forward": rows + counts, "backward": rows}
    assert sent["all_to_all"] == {"receipts": rows, "forward": rows + counts, "backward": rows}
    copies = 2 * 2 * 8  # deepep tells how many tokens come, too
    for name in ("deepep per_rank", "deepep per_slot"):
        assert 0 < sent[name]["receipts"] == sent[name]["forward"] - counts - copies


def test_least_bytes_by_hand() -> None:
    least = least_bytes(Shape(T=2, D=3, F=5, E=7, K=2))
    assert least["permute"] == 2 * (6 + 12)
    assert least["swiglu"] + least["swiglu, backward"] == 2 * 8 * 20
    assert least["select"] == 4 * 14 + 4 * 12
    assert sum(least.values()) == 36 + 320 + 36 + 60 + 60 + (12 + 56) + 104 + (112 + 12)


def test_targets_hold_or_not() -> None:
    limits = {"layer.mean.limit": 1.5, "layer.worst.limit": 0.995}
    found = {"layer.mean": 1.3, "layer.worst": 0.99, "ep4.deepep": 1.0} | limits
    head, mean, worst, deepep = targets.table(found)
    assert head[0] == "target"
    assert mean[1:] == [">= 1.3", "1.300", "1.500", "pass"]
    assert worst[1:] == [">= 1.0", "0.990", "0.995", "FAIL"], "also where the limit is below the bound"
    assert deepep[1:] == ["> 1.0", "1.000", "", "FAIL"]
    bounds = [target for target in targets.TARGETS if (target.low is None) == (target.high is None)]
    assert not bounds, "a target has one bound"


def test_ranks_follow_the_world_size() -> None:
    assert BenchSettings(world_size=4).ep_sizes == [2, 4]
    assert BenchSettings(world_size=3).ep_sizes == [2]
    assert BenchSettings(world_size=1).ep_sizes == []


def test_the_command(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "QUICK", (TINY,))
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    argv = [
        "--quick",
        "--only",
        "layer",
        "memory",
        "traffic",
        "growth",
        "--json",
        str(out),
        "--plot",
        str(picture),
    ]
    assert bench.main(argv) == 0
    first, *_ = printed = capsys.readouterr().out.splitlines()
    assert "torchtitan 0.3" in first
    assert "--quick --only layer" in first
    assert sum(line.startswith(f"| {TINY} |") for line in printed) == 3
    found = json.loads(out.read_text())
    assert len(found["parts"]["layer"][str(TINY)]["seconds"][STOCK]) == 3
    assert {target["name"].split(":")[0] for target in found["targets"]} >= {"layer", "floor", "traffic"}
    assert xml.dom.minidom.parse(str(picture)).documentElement.tagName == "svg"
    assert plot.picture({}).startswith("<svg")


def test_traffic_alone_lists_the_biggest_ops(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "QUICK", (TINY,))
    assert bench.main(["--quick", "--only", "traffic"]) == 0
    assert "`torchtitan::deterministic_scatter_add`" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--only", "speed"], ["--world-size", "0"]])
def test_a_wrong_argument_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(argv)
    assert argv[0] in capsys.readouterr().err
