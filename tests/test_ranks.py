"""The harness must pass on what works, and must notice each way in which a rank can fail."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.ranks import Mode, RankContext, RankError, RankTimeout, close_pools, run_ranks, worker_pids

MODES: list[Mode] = ["gloo", "local_tensor"]

# By EP size: SPLITS[ep][rank][peer] rows go from a rank to each peer of its EP group (consecutive ranks).
# Rank 1 has nothing to send; with EP 4, rank 3 receives nothing.
SPLITS = {
    4: [[1, 0, 3, 0], [0, 0, 0, 0], [2, 2, 1, 0], [0, 1, 0, 0]],
    2: [[1, 2], [0, 0], [0, 3], [2, 1]],
}


class Exchange(torch.autograd.Function):
    """All-to-all whose backward is the all-to-all the other way."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.saved = (sent, received, group)
        return funcol.wait_tensor(funcol.all_to_all_single(x_ND, received, sent, group))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.saved
        back = funcol.wait_tensor(funcol.all_to_all_single(grad_RD.contiguous(), sent, received, group))
        return back, None, None, None


@dataclass(frozen=True)
class Exchanged:
    """What one rank saw."""

    y_RD: Tensor
    grad_ND: Tensor
    rows: int


def exchange(ctx: RankContext, ep: int, chunks: list[Tensor], factors: list[Tensor]) -> Exchanged:
    """Each rank sends its rows away, and squares what it gets times its own factor."""
    group = ctx.device_mesh((ctx.world_size // ep, ep), ("dp", "ep")).get_group("ep")
    x_ND = ctx.per_rank(chunks)
    sent_W = ctx.per_rank([torch.tensor(row) for row in SPLITS[ep]])
    received_W = funcol.wait_tensor(funcol.all_to_all_single(sent_W, None, None, group))
    y_RD = Exchange.apply(x_ND, sent_W.tolist(), received_W.tolist(), group)
    (y_RD * ctx.per_rank(factors)).square().sum().backward()
    return Exchanged(y_RD, x_ND.grad, y_RD.shape[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ep", [4, 2])
def test_uneven_all_to_all(ep: int, mode: Mode) -> None:
    """Forward and backward, row by row, against the split table.

    With EP 4, rank 0 sends 1, 0, 3, 0: it keeps its first row and rank 2 gets the other three. It receives
    that row and then the first two of rank 2, which sends 2, 2, 1, 0.
    """
    splits = SPLITS[ep]
    generator = torch.Generator().manual_seed(1)
    chunks = [torch.randn(sum(row), 3, generator=generator, dtype=torch.float64) for row in splits]
    factors = [torch.tensor(float(f), dtype=torch.float64) for f in (1, 2, 3, 4)]
    leaves = [chunk.clone().requires_grad_() for chunk in chunks]
    results = run_ranks(exchange, 4, ep, leaves, factors, mode=mode)
    pieces = [chunk.split(row) for chunk, row in zip(chunks, splits, strict=True)]
    for rank, result in enumerate(results):
        first, place = rank - rank % ep, rank % ep
        assert torch.equal(result.y_RD, torch.cat([pieces[first + src][place] for src in range(ep)]))
        assert result.rows == sum(splits[first + src][place] for src in range(ep))
        grads = [2 * piece * factors[first + dst] ** 2 for dst, piece in enumerate(pieces[rank])]
        torch.testing.assert_close(result.grad_ND, torch.cat(grads), rtol=1e-14, atol=0)
        assert result.grad_ND.shape == chunks[rank].shape
    if ep == 4:
        assert torch.equal(results[0].y_RD, torch.cat([chunks[0][:1], chunks[2][:2]]))


def permute(ctx: RankContext, chunks: list[Tensor], ids: list[Tensor]) -> list[Tensor]:
    """The local half of a dispatcher: counts, stable sort, gather, and a fixed-order sum."""
    x_TD, ids_TK = ctx.per_rank(chunks), ctx.per_rank(ids)
    top_k = ids_TK.shape[1]
    order_N = ids_TK.reshape(-1).argsort(stable=True)
    counts_E = torch.bincount(ids_TK.reshape(-1), minlength=3)
    x_ND = x_TD.repeat_interleave(top_k, dim=0)[order_N]
    starts_N = torch.repeat_interleave(torch.arange(3), counts_E, output_size=order_N.shape[0])
    y_ND = x_ND * (starts_N + 1).unsqueeze(1)
    back_TKD = y_ND[order_N.argsort()].view(x_TD.shape[0], top_k, x_TD.shape[1])
    out_TD = back_TKD.sum(dim=1)
    (out_TD * x_TD[:, :1]).square().sum().backward()
    return [out_TD, x_TD.grad, counts_E]


@pytest.mark.parametrize("mode", MODES)
def test_index_operations_with_uneven_tokens(mode: Mode) -> None:
    """Both tiers against the same lines written densely; rank 1 has no token."""
    generator = torch.Generator().manual_seed(2)
    sizes = (3, 0, 1, 5)
    chunks = [torch.randn(n, 4, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes]
    ids = [torch.rand(n, 3, generator=generator).argsort(dim=1)[:, :2] for n in sizes]
    for result, chunk, ids_TK in zip(run_ranks(permute, 4, chunks, ids, mode=mode), chunks, ids, strict=True):
        out_TD = chunk * (ids_TK + 1).sum(1, keepdim=True)
        (grad_TD,) = torch.autograd.grad((out_TD * chunk[:, :1]).square().sum(), chunk)
        torch.testing.assert_close(result[0], out_TD.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(result[1], grad_TD, rtol=1e-13, atol=1e-15)
        assert torch.equal(result[2], torch.bincount(ids_TK.flatten(), minlength=3))


def sequence_parallel(ctx: RankContext, full_BLD: Tensor) -> list[Any]:
    """A (dp 2, tp 2) mesh with L=5 sharded 3, 2 over tp; local work, and back to a DTensor."""
    mesh = ctx.device_mesh((2, 2), ("dp", "tp"))
    shards = [full_BLD[:, :3], full_BLD[:, 3:]]
    x_BLD = DTensor.from_local(
        ctx.per_rank([shards[r % 2] for r in range(4)]),
        mesh["tp"],
        [Shard(1)],
        run_check=False,
        shape=full_BLD.shape,
        stride=full_BLD.stride(),
    ).requires_grad_()
    local_BLD = x_BLD.to_local(grad_placements=[Shard(1)])
    y_BLD = DTensor.from_local(
        local_BLD * (mesh["tp"].get_local_rank() + 1),
        mesh["tp"],
        [Shard(1)],
        run_check=False,
        shape=full_BLD.shape,
        stride=full_BLD.stride(),
    )
    out_BLD = y_BLD.redistribute(placements=[Replicate()]).to_local()
    out_BLD.square().sum().backward()
    return [out_BLD, x_BLD.grad, mesh["tp"].get_local_rank(), mesh["dp"].get_local_rank()]


@pytest.mark.parametrize("mode", MODES)
def test_uneven_sequence_parallel_dtensor(mode: Mode) -> None:
    """Uneven DTensor shards, forward and backward; the mesh coordinates are per rank."""
    full_BLD = torch.randn(2, 5, 3, dtype=torch.float64)
    scale_L1 = torch.tensor([1, 1, 1, 2, 2], dtype=torch.float64).unsqueeze(1)
    results = run_ranks(sequence_parallel, 4, full_BLD, mode=mode)
    for rank, (out_BLD, grad_BLD, tp_rank, dp_rank) in enumerate(results):
        assert (dp_rank, tp_rank) == divmod(rank, 2)
        torch.testing.assert_close(out_BLD, full_BLD * scale_L1, rtol=0, atol=0)
        expected_BLD = (2 * full_BLD * scale_L1**2).split([3, 2], dim=1)[tp_rank]
        torch.testing.assert_close(grad_BLD, expected_BLD, rtol=1e-14, atol=0)


def reuse_an_address(ctx: RankContext) -> list[Any]:
    """Coordinates of slices that die at once, so that one slice may get the address of another."""
    mesh = ctx.device_mesh((2, 2), ("dp", "tp"))
    return [mesh[name].get_local_rank() for _ in range(50) for name in ("tp", "dp")]


@pytest.mark.parametrize("mode", MODES)
def test_coordinates_of_short_lived_meshes(mode: Mode) -> None:
    """LocalTensorMode's cache by id() would give "dp" the coordinates of a dead "tp"."""
    for rank, coordinates in enumerate(run_ranks(reuse_an_address, 4, mode=mode)):
        assert coordinates == [rank % 2, rank // 2] * 50


def describe(ctx: RankContext) -> dict[str, Any]:
    """Context values, replicated tensors and per-rank ints."""
    weight = ctx.replicate(torch.ones(2)).requires_grad_()
    return {
        "rank": ctx.rank,
        "size": (ctx.world_size, ctx.mode),
        "int": ctx.per_rank([5, 7]) * 2,
        "weight": weight * (ctx.rank + 1),
        "random": torch.randn(2),
        "made_inside": ctx.per_rank([torch.zeros(1), torch.ones(1)]),
    }


@pytest.mark.parametrize("mode", MODES)
def test_context(mode: Mode) -> None:
    """The same values come back from both tiers."""
    for rank, result in enumerate(run_ranks(describe, 2, mode=mode)):
        assert result["rank"] == rank
        assert result["size"] == (2, mode)
        assert result["int"] == (10, 14)[rank]
        assert result["weight"].tolist() == [rank + 1.0] * 2
        assert not result["weight"].requires_grad
        assert torch.equal(result["random"], torch.randn(2, generator=torch.Generator().manual_seed(0)))
        assert result["made_inside"].tolist() == [float(rank)]
    with pytest.raises((ValueError, RankError), match="1 values for 2 ranks"):
        run_ranks(too_few_values, 2, mode=mode)


def too_few_values(ctx: RankContext) -> None:
    """A mistake in a body."""
    ctx.per_rank([1])


def test_pool_is_reused() -> None:
    """The same processes serve call after call, and a body cannot leak its settings into the next."""
    pids = run_ranks(poison, 2)
    assert pids == worker_pids(2)
    assert run_ranks(settings, 2) == [(pid, torch.float32, True, None) for pid in pids]


def poison(ctx: RankContext) -> int:
    """Changes process-wide settings."""
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["TITAN_MOE_POISON"] = "1"
    return os.getpid()


def settings(ctx: RankContext) -> tuple[Any, ...]:
    """The settings that `poison` changed, after a collective: it also proves that the pool works."""
    dist.all_reduce(torch.ones(1))
    return os.getpid(), torch.get_default_dtype(), torch.is_grad_enabled(), os.environ.get("TITAN_MOE_POISON")


def raise_on(ctx: RankContext, ranks: list[int]) -> None:
    """Raises on some ranks; the others go on to a collective."""
    if ctx.rank in ranks:
        raise ValueError("token 3 has ids [1, 1]")
    dist.all_reduce(torch.ones(1))


def test_error_on_every_rank_keeps_the_pool() -> None:
    """All ranks are in step after the same error, so nothing has to be restarted."""
    before = run_ranks(settings, 2)
    with pytest.raises(RankError, match=r"rank \d of 2: ValueError: token 3 has ids \[1, 1\]") as caught:
        run_ranks(raise_on, 2, [0, 1])
    assert {rank: failure.kind for rank, failure in caught.value.failures.items()} == {
        0: "ValueError",
        1: "ValueError",
    }
    assert "in raise_on" in str(caught.value)
    assert run_ranks(settings, 2) == before


def test_error_on_one_rank_is_not_hidden_by_the_others_waiting() -> None:
    """Rank 0 waits in an all_reduce that rank 1 never joins: the cause is reported, not the wait."""
    with pytest.raises(RankError) as caught:
        run_ranks(raise_on, 2, [1])
    failures = caught.value.failures
    assert list(failures) == [1, 0]
    assert failures[1].kind == "ValueError"
    assert failures[0].kind == "no answer"
    assert "in raise_on" in failures[0].details
    assert len(run_ranks(settings, 2)) == 2


def hang(ctx: RankContext) -> None:
    """Rank 0 is alone in a collective, rank 1 sleeps, rank 2 returns."""
    if ctx.rank == 0:
        dist.all_reduce(torch.ones(1))
    if ctx.rank == 1:
        time.sleep(600)


def test_hang_is_a_timeout() -> None:
    """The ranks that hang are named, with the lines they hang at; nobody survives; the next call works."""
    pids = [result[0] for result in run_ranks(settings, 3)]
    start = time.monotonic()
    with pytest.raises(RankTimeout, match=r"ranks \[0, 1\] of 3 did not answer within 3 s") as caught:
        run_ranks(hang, 3, timeout_s=3)
    assert time.monotonic() - start < 15
    assert caught.value.ranks == (0, 1)
    at_rank_0, at_rank_1 = str(caught.value).split("rank 1 was at")
    assert "in all_reduce" in at_rank_0
    assert "in all_reduce" not in at_rank_1
    assert "test_ranks.py" in at_rank_1
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    again = [result[0] for result in run_ranks(settings, 3)]
    assert not set(again) & set(pids)


def die(ctx: RankContext) -> None:
    """Each rank but the last dies in its own way, while the last one waits for them."""
    if ctx.rank == 0:
        print("last words")
        os._exit(3)
    if ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def test_death_is_reported() -> None:
    """A rank that is gone is an error at once, not a timeout; the next call works."""
    run_ranks(settings, 3)
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(die, 3)
    assert time.monotonic() - start < 30
    failures = caught.value.failures
    assert (failures[0].kind, failures[0].message) == ("died", "exit code 3")
    assert "last words" in failures[0].details
    assert (failures[1].kind, failures[1].message) == ("died", "killed by SIGKILL")
    assert list(failures)[2] == 2
    assert len(run_ranks(settings, 2)) == 2


def leave_a_collective(ctx: RankContext) -> None:
    """Returns on every rank, but rank 0 has started an all_reduce that nobody joins."""
    if ctx.rank == 0:
        dist.all_reduce(torch.ones(1), async_op=True)


def test_ranks_out_of_step_are_reported() -> None:
    """The left-over collective would have met one of the next test's."""
    with pytest.raises(RankError, match="different numbers of collectives"):
        run_ranks(leave_a_collective, 2)


def send_along(ctx: RankContext) -> None:
    """As a pipeline does: the ends send and receive once, the one between them twice."""
    one = torch.ones(1)
    if ctx.rank > 0:
        dist.recv(one, ctx.rank - 1)
    if ctx.rank < ctx.world_size - 1:
        dist.send(one, ctx.rank + 1)


@pytest.mark.slow
def test_a_pipeline_leaves_nothing_to_the_next_body() -> None:
    """Its ranks' counts differ for good; what the next body adds to them is what counts."""
    with pytest.raises(RankError, match="different numbers of collectives"):
        run_ranks(send_along, 3)
    run_ranks(send_along, 3, in_step=False)
    pids = worker_pids(3)
    run_ranks(settings, 3)
    assert worker_pids(3) == pids, "the same workers went on"
    with pytest.raises(RankError, match="different numbers of collectives"):
        run_ranks(leave_a_collective, 3)


def test_functions_a_worker_cannot_import_are_refused() -> None:
    """Before any process is started."""
    with pytest.raises(ValueError, match="top-level function"):
        run_ranks(lambda ctx: None, 2)


def sleep_here(ctx: RankContext) -> None:
    """Hangs in any mode."""
    time.sleep(600)


def raise_bad(ctx: RankContext) -> None:
    """Raises on all ranks."""
    raise ValueError("bad")


def branch_on_data(ctx: RankContext) -> int:
    """Takes a different path on each rank."""
    return 1 if ctx.per_rank([torch.tensor(0.0), torch.tensor(1.0)]) > 0.5 else 2


def test_local_tensor_errors() -> None:
    """The same exceptions as from gloo, no process group left behind, and no guess where ranks disagree."""
    with pytest.raises(RankError, match="ValueError: bad") as caught:
        run_ranks(raise_bad, 3, mode="local_tensor")
    assert set(caught.value.failures) == {0, 1, 2}
    with pytest.raises(RankTimeout, match="sleep_here") as hung:
        run_ranks(sleep_here, 2, mode="local_tensor", timeout_s=0.5)
    assert hung.value.ranks == (0, 1)
    assert not dist.is_initialized()
    with pytest.raises(RankError, match="ranks disagree on aten"):
        run_ranks(branch_on_data, 2, mode="local_tensor")


def wrong_output_splits(ctx: RankContext) -> Tensor:
    """Both ranks send one row to each rank, and expect three rows."""
    x_ND = ctx.per_rank([torch.ones(2, 4), torch.ones(2, 4)])
    return funcol.wait_tensor(funcol.all_to_all_single(x_ND, [1, 2], [1, 1], dist.group.WORLD))


@pytest.mark.parametrize("mode", MODES)
def test_wrong_output_splits_are_noticed(mode: Mode) -> None:
    """Plain LocalTensorMode does not read the output splits and would return two rows."""
    with pytest.raises((RankError, RankTimeout)) as caught:
        run_ranks(wrong_output_splits, 2, mode=mode, timeout_s=5)
    if mode == "local_tensor":
        assert "rank 0 has output splits [1, 2], its peers send [1, 1]" in str(caught.value)


@pytest.mark.slow
def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    """SIGKILL gives the test process no chance to clean up: the workers notice by themselves."""
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from tests.ranks import run_ranks, worker_pids; from test_ranks import sleep_here, settings\n"
        "run_ranks(settings, 1); print(*worker_pids(1), flush=True); run_ranks(sleep_here, 1)\n"
    )
    folder = Path(__file__).parent
    command = [sys.executable, "-c", script, str(folder.parent), str(folder)]
    environment = dict(os.environ, TMPDIR=str(tmp_path))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_running(pid)
    assert not list(tmp_path.glob("titan_moe_ranks_*"))


@pytest.mark.slow
def test_a_leaked_process_group_fails_its_test(tmp_path: Path) -> None:
    """Negative control of conftest.py: the test that leaks is blamed, the next one starts clean."""
    (tmp_path / "test_leak.py").write_text(
        "import torch.distributed as dist\n"
        "def test_leaks(): dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "def test_next(): assert not dist.is_initialized()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "--rootdir", ".", "test_leak.py"]
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.parent))
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "the test left a process group" in done.stdout
    assert "2 passed, 1 error" in done.stdout


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_close_pools_ends_every_worker() -> None:
    """As at the end of the session."""
    pids = [result[0] for result in run_ranks(settings, 4)]
    close_pools()
    assert worker_pids(4) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
