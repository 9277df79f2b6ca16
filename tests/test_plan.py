"""The plan against real runs on 4 gloo ranks: what they hold, keep and send; and what it must refuse."""

import functools
import json
import os
import re
import resource
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental._context_parallel._cp_custom_ops import (
    flex_cp_allgather,
    flex_cp_allgather_backward,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ranks import RankContext, run_ranks
from tests.training import NUM_LAYERS
from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.dispatch.uniform import ranks_per_token
from titan_moe.plan import attention, wire
from titan_moe.plan.__main__ import main
from titan_moe.plan.memory import Alive, Held, held
from titan_moe.plan.rehearsal import MicrobatchCost, Rehearsal, fake_world, groups_of
from titan_moe.plan.routes import RehearsedRoutes
from titan_moe.plan.wire import Wire
from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

ROOT = Path(__file__).parent.parent
DEBUG = str(ROOT / "train_configs" / "debug_local.toml")
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp4": (4, {}),
    "fsdp2-tp2-ep2": (4, {"tensor_parallel_degree": 2, "expert_parallel_degree": 2}),
    "hsdp2x2-ep2": (4, {"data_parallel_replicate_degree": 2, "expert_parallel_degree": 2}),
    "tp4-ep4": (4, {"tensor_parallel_degree": 4, "expert_parallel_degree": 4}),
    "fsdp3": (3, {}),  # 8 experts and a vocabulary of 2,048 over 3 ranks
}


def arguments(mesh: str, *more: str) -> list[str]:
    """A short run whose tokens take the experts in turn."""
    degrees = MESHES[mesh][1]
    argv = [f"--parallelism.{name}={degree}" for name, degree in degrees.items()]
    dispatcher = "all_to_all" if "expert_parallel_degree" in degrees else "local"
    shape = ["--training.seq_len=128", "--training.local_batch_size=2", "--training.steps=2"]
    quiet = ["--debug.no-enable_structured_logging", "--debug.moe_force_load_balance"]
    return [DEBUG, *argv, f"--moe.dispatcher={dispatcher}", *shape, *quiet, *more]


class Measured(NamedTuple):
    """Of one rank; by mesh axis, collective and dtype where it is sent."""

    held: Held
    after_forward: int
    peak: int
    sent: dict[tuple[str, str, str], float]


def measured(of: Held, microbatch: MicrobatchCost) -> Measured:
    named = {(call.axis, call.collective, str(call.dtype)): n for call, n in microbatch.sent.items()}
    return Measured(of, microbatch.after_forward, microbatch.peak, named)


def zeros(q_BLNH: torch.Tensor, k_BLNH: torch.Tensor, v_BLNH: torch.Tensor) -> Any:
    """Attention's shapes for real tensors."""
    return torch.zeros(*q_BLNH.shape[:3], v_BLNH.shape[-1], dtype=q_BLNH.dtype), torch.zeros(q_BLNH.shape[:3])


def zero_gradients(grad_BLNH: torch.Tensor, *qkv: torch.Tensor) -> Any:
    return tuple(torch.zeros_like(x_BLNH) for x_BLNH in qkv)


def real_run(ctx: RankContext, argv: list[str], crowd: bool) -> Measured:
    """A second training step on real ranks, for real but for the arithmetic of attention.

    Args:
        crowd: every token takes as many of the first EP rank's experts as it can.
    """
    attention._attention.register_kernel("cpu")(zeros)
    attention._attention_backward.register_kernel("cpu")(zero_gradients)
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:NUM_LAYERS]
    attention.plan_attention(model)
    job.trainer.activation_checkpoint = attention.planned(job.trainer.activation_checkpoint)
    trainer = Trainer(Trainer.Config.of(job))
    if crowd:
        for moe in trainer.optimizers.load_balancer.layers.values():
            moe.expert_bias_E[: len(moe.expert_bias_E) // 2] += 100.0
    names = {group.group_name: name for name, group in groups_of(trainer.parallel_dims)}
    plain, found = trainer.forward_backward_step, []

    def watched(**kwargs: Any) -> torch.Tensor:
        wire, alive = Wire(names), Alive()
        kept: list[int] = []
        hook = trainer.model_parts[0].register_forward_hook(lambda *_: kept.append(alive.now))
        with wire, alive:
            loss = plain(**kwargs)
        hook.remove()
        found.append(MicrobatchCost(kept[-1], alive.peak, wire.sent))
        return loss

    trainer.forward_backward_step = watched  # type: ignore[method-assign]
    try:
        trainer.train()
    finally:
        trainer.close()
    return measured(held(trainer.model_parts, trainer.optimizers), found[-1])


@functools.cache
def real(mesh: str, *more: str, crowd: bool = False) -> tuple[Measured, ...]:
    """By rank."""
    with tempfile.TemporaryDirectory() as folder:
        argv = arguments(mesh, f"--dump_folder={folder}", *more)
        return tuple(run_ranks(real_run, MESHES[mesh][0], argv, crowd, timeout_s=180))


@functools.cache
def rehearsed(mesh: str, *more: str, routing: Any = "balanced") -> Measured:
    """Of the same run."""
    return rehearse(mesh, *more, routing=routing)


def rehearse(mesh: str, *more: str, routing: Any = "balanced") -> Measured:
    world_size = MESHES[mesh][0]
    job = load(arguments(mesh, *more), world_size=world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:NUM_LAYERS]
    with fake_world(world_size):
        rehearsal = Rehearsal(job.trainer, world_size)
        microbatch = rehearsal.microbatch(routing)
        rehearsal.optimizer_step()
        return measured(rehearsal.held(), microbatch)


def assert_same_memory(planned: Measured, ran: Measured, tolerance: float = 0.01) -> None:
    """The real run has token ids, a mask and counters besides."""
    assert planned.after_forward == pytest.approx(ran.after_forward, rel=tolerance)
    assert planned.peak == pytest.approx(ran.peak, rel=tolerance)


SLOW = [pytest.mark.slow]
FAST = ("fsdp2-tp2-ep2",)


@pytest.mark.parametrize("mesh", [pytest.param(m, marks=[] if m in FAST else SLOW) for m in MESHES])
class TestAgainstRealRanks:
    def test_parameters_gradients_and_state_to_the_byte(self, mesh: str) -> None:
        ranks = real(mesh)
        fullest = [max(sizes) for sizes in zip(*(rank.held for rank in ranks), strict=True)]
        assert list(rehearsed(mesh).held) == fullest
        assert (ranks[0].held != ranks[-1].held) == (mesh == "fsdp3"), "3 ranks divide nothing evenly"

    def test_sent_to_the_byte(self, mesh: str) -> None:
        assert rehearsed(mesh).sent == real(mesh)[0].sent

    def test_activations(self, mesh: str) -> None:
        assert_same_memory(rehearsed(mesh), real(mesh)[0])


LIVE = "--debug.no-moe_force_load_balance"
AGAIN = {  # flags; every token to the first EP rank's experts; tolerance
    "full recomputation": (("--activation_checkpoint.mode=full",), False, 0.01),
    "selective recomputation": (("--activation_checkpoint.mode=selective",), False, 0.01),
    "three microbatches": (("--training.global_batch_size=12",), False, 0.01),
    "seq_len 127": (("--training.seq_len=127",), False, 0.01),
    "live routes": ((LIVE,), False, 0.1),
    "live routes, deepep": ((LIVE, "--moe.dispatcher=deepep"), False, 0.1),
    "a crowd": ((LIVE,), True, 0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize(("more", "crowd", "tolerance"), AGAIN.values(), ids=AGAIN)
def test_other_runs_against_real_ranks(more: tuple[str, ...], crowd: bool, tolerance: float) -> None:
    ran, *_ = ranks = real("fsdp2-tp2-ep2", *more, crowd=crowd)
    planned = rehearsed("fsdp2-tp2-ep2", *more, routing="worst" if crowd else "balanced")
    ranks = ranks if LIVE in more and not crowd else [ran]  # of live routes only the mean is balanced
    # The real run's microbatch was watched from its own start, when the gradients of others were there.
    there_before = ran.held.gradients if "--training.global_batch_size=12" in more else 0
    assert_same_memory(planned, ran._replace(peak=ran.peak + there_before), tolerance)
    assert planned.held == ran.held
    assert planned.sent.keys() == ran.sent.keys()
    for kind, amount in planned.sent.items():
        rows = kind[1] == "all-to-all" and kind[2] != "torch.int64"
        mean = sum(rank.sent[kind] for rank in ranks) / len(ranks)
        assert amount == pytest.approx(mean, rel=tolerance if rows else 0), kind


class TestByHand:
    """What a mesh must send, from shapes: B 2, L 128, D 256, 3 layers, 2 of them with 8 experts, top 3."""

    def test_fsdp(self) -> None:
        """Every block is gathered for forward and for backward, norm and head once: torchtitan keeps them."""
        job = load(arguments("fsdp4"), world_size=4)
        model: Any = job.trainer.model_spec.model
        model.layers = model.layers[:NUM_LAYERS]
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in model.build().named_parameters()}
        total, kept = sum(sizes.values()), sizes["norm.weight"] + sizes["lm_head.weight"]
        sent = rehearsed("fsdp4").sent
        assert sent["fsdp", "all-gather", "torch.bfloat16"] == 3 / 4 * 2 * (2 * total - kept)
        assert sent["fsdp", "reduce-scatter", "torch.float32"] == 3 / 4 * 4 * total

    def test_tp(self) -> None:
        """Attention and feed-forward (or shared experts) gather and scatter, both ways; so do the ends."""
        sequence = 2 * 128 * 256 * 2  # bytes
        sent = rehearsed("fsdp2-tp2-ep2").sent
        assert sent["tp", "all-gather", "torch.bfloat16"] == (2 * 2 * NUM_LAYERS + 2) * sequence / 2
        assert sent["tp", "reduce-scatter", "torch.bfloat16"] == (2 * 2 * NUM_LAYERS + 2) * sequence / 2

    def test_ep(self) -> None:
        """Two layers, four exchanges each; of 3 rows per token and SP rank half go to the other rank."""
        rows = 2 * 64 * 3
        sent = rehearsed("fsdp2-tp2-ep2").sent
        assert sent["ep", "all-to-all", "torch.bfloat16"] == 2 * 4 * rows * 256 * 2 / 2

    def test_hsdp(self) -> None:
        """Each replica's reduced gradients, fp32, over 2 replicas: 2 * 1/2 of a shard."""
        sent, shard = rehearsed("hsdp2x2-ep2").sent, rehearsed("hsdp2x2-ep2").held.gradients
        assert sent["dp_replicate", "all-reduce", "torch.float32"] == shard

    @pytest.mark.parametrize("tokens", [2048, 3])
    def test_routes(self, tokens: int) -> None:
        limits = DispatchLimits(num_experts=256, top_k=8, dim=1, ep_size=64, num_max_tokens_per_rank=tokens)
        balanced, worst = RehearsedRoutes(limits, "balanced"), RehearsedRoutes(limits, "worst")
        assert balanced.rows_received == pytest.approx(tokens * 8, abs=64)
        assert worst.rows_received == tokens * 64 * 4, "4 experts live here: a token takes all of them"
        for routes in (balanced, worst):
            assert sum(routes.rows[0]) == tokens * 8, "each pick is sent"

    def test_an_unknown_question_is_refused(self) -> None:
        limits = DispatchLimits(num_experts=8, top_k=2, dim=1, ep_size=4, num_max_tokens_per_rank=4)
        with (
            FakeTensorMode(),
            RehearsedRoutes(limits, "balanced"),
            pytest.raises(RuntimeError, match=r"\(3, 4\)"),
        ):
            torch.zeros(3, 4).tolist()


def collectives(ctx: RankContext) -> dict[str, float]:
    """Each way to call them, 8 fp32 numbers (32 bytes) given by every rank of 4."""
    mesh = ctx.device_mesh((4,), ("ring",))
    given, group = torch.ones(8), mesh.get_group()
    with Wire({group.group_name: "ring"}) as wire:
        dist.all_reduce(given.clone(), group=group)
        dist.all_gather_into_tensor(torch.empty(32), given, group=group)
        dist.reduce_scatter_tensor(torch.empty(2), given, group=group)
        funcol.all_to_all_single(given, [2] * 4, [2] * 4, mesh).wait()
        flex_cp_allgather(given, given, 0, group.group_name)
        flex_cp_allgather_backward(given, given, 0, group.group_name)
        DTensor.from_local(given, mesh, [Shard(0)]).redistribute(placements=[Replicate()]).to_local() + 1
        dist.barrier(group)
    return {call.collective: amount for call, amount in wire.sent.items()}


def test_wire_counts_a_ring() -> None:
    expected = {"all-reduce": 2 * 24, "all-gather": 4 * 96, "reduce-scatter": 3 * 24, "all-to-all": 24}
    assert run_ranks(collectives, 4) == [expected] * 4


class TestAlive:
    def test_views_and_what_was_there_are_not_new_and_the_dead_do_not_count(self) -> None:
        before = torch.ones(8)
        with Alive() as alive:
            kept = before * 2
            view, _ = kept.view(2, 4), before.add_(1)
            assert (alive.now, alive.peak) == (32, 32)
            (kept + 1).sum().item()
            assert (alive.now, alive.peak) == (32, 68)
            del kept
            assert alive.now == 32
            del view
            assert alive.now == 0

    def test_resized_storage(self) -> None:
        with Alive() as alive:
            kept = torch.empty(8)
            kept.untyped_storage().resize_(0)
            assert (alive.now, alive.peak) == (0, 32)
            kept.untyped_storage().resize_(64)
            assert (alive.now, alive.peak) == (64, 64)


class TestNegativeControls:
    """The comparisons above see a wrong count."""

    def test_what_fsdp_gathers_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Freed by a resize that nobody watched, every gathered block would count until the end."""
        monkeypatch.setattr(Alive, "__enter__", TorchDispatchMode.__enter__)
        monkeypatch.setattr(Alive, "__exit__", TorchDispatchMode.__exit__)
        assert rehearse("fsdp2-tp2-ep2").peak > 1.1 * rehearsed("fsdp2-tp2-ep2").peak

    def test_own_rows_counted_as_sent_are_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wire, "_to_others", lambda tensor, splits, group: wire._bytes(tensor))
        kind = ("ep", "all-to-all", "torch.bfloat16")
        assert rehearse("fsdp2-tp2-ep2").sent[kind] == 2 * rehearsed("fsdp2-tp2-ep2").sent[kind]

    def test_experts_on_every_rank_are_seen(self) -> None:
        """EP taken for a copy instead of a shard."""
        alike = rehearsed("fsdp2-tp2-ep2").held.parameters
        replicated = rehearsed("hsdp2x2-ep2").held.parameters
        assert replicated > 1.5 * alike


class TestCommand:
    def run(self, monkeypatch: pytest.MonkeyPatch, *argv: str, ngpu: str = "4") -> int:
        monkeypatch.setenv("NGPU", ngpu)
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        return main([*argv, "--debug.no-enable_structured_logging"])

    def test_page_and_json_agree(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        config, file = ROOT / "train_configs" / "debug_fsdp_tp_ep.toml", tmp_path / "plan.json"
        assert self.run(monkeypatch, str(config), f"--json={file}", "--memory-gib=0.23") == 0
        page, found = capsys.readouterr().out, json.loads(file.read_text())
        assert page.count("\n") <= 45
        held = re.search(r"^  sum +([\d.]+)$", page, re.MULTILINE)
        assert held is not None
        assert float(held[1]) == round(sum(found["held"].values()) / 2**30, 3)
        assert re.search(rf"^  tp +{found['sent_by_axis']['tp'] / 2**30:.3f} ", page, re.MULTILINE)
        assert [found["routing"][load]["fits"] for load in ("balanced", "worst")] == [True, False]
        assert "fits with balanced routing, 0.23 of 0.23 GiB; the worst takes 0.23" in page
        all_to_all, per_rank, _ = found["dispatchers"].values()
        layers, rows = 5, 6 * 64 * 3
        assert all_to_all["dispatch"] == all_to_all["combine"] == layers * rows * 256 * 2 / 2
        assert all_to_all["step"] == pytest.approx(4 * all_to_all["dispatch"], rel=1e-4), "and counts"
        assert found["sent_by_axis"]["ep"] == pytest.approx(all_to_all["step"], rel=1e-4), "and a norm"
        assert per_rank["dispatch"] / all_to_all["dispatch"] == pytest.approx(ranks_per_token(8, 3, 2) / 3)
        assert per_rank["step"] > 4 * per_rank["dispatch"], "ids and scores come with the rows"

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (("--training.stepz=3",), "did you mean 'steps'"),
            (("--parallelism.tensor_parallel_degree=3",), "tensor_parallel_degree"),
            (("--parallelism.pipeline_parallel_degree=2",), "pipeline_parallel_degree (2)"),
            (("--model.moe=torchtitan",), "model.moe ('torchtitan')"),
            (("--memory-gib=0",), "--memory-gib (0)"),
            (("--memory-gib=x",), "--memory-gib"),
            (("--memory-gib=nan",), "--memory-gib (nan)"),
            (("--json=/tmp",), "--json (/tmp) is a folder"),
            (
                ("--compile.enable", "--activation_checkpoint.mode=memory_budget"),
                "activation_checkpoint.mode (memory_budget)",
            ),
            (("--ranks-per-node=-1",), "--ranks-per-node (-1)"),
            (("--json=/no/such/folder/plan.json",), "/no/such/folder"),
        ],
    )
    def test_a_wrong_call_is_one_line(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        argv: tuple[str, ...],
        words: str,
    ) -> None:
        assert self.run(monkeypatch, DEBUG, *argv) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err

    @pytest.mark.slow
    def test_671b_on_512_ranks_within_5_minutes_and_20_gib(self, tmp_path: Path) -> None:
        environment = dict(os.environ, COMM_MODE="fake_backend", NGPU="512")
        command = ["bash", str(ROOT / "run_train.sh"), "train_configs/deepseek_v3_671b.toml"]
        command += ["--json", str(tmp_path / "plan.json")]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=900)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # One thread: its CPU time is the time it takes where nothing else runs.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 300
        assert after.ru_maxrss * 1024 < 20 * 2**30
        found = json.loads((tmp_path / "plan.json").read_text())
        assert found["ranks"] == 512
        # Sharded over all ranks but for what TP copies: norms, low-rank projections, the gate.
        even = found["model_parameters"] * 4 / 512
        assert even < found["held"]["parameters"] < 1.02 * even
        assert found["held"]["optimizer"] == pytest.approx(2 * found["held"]["parameters"], rel=1e-4)


@pytest.mark.slow
def test_two_nodes_for_real(tmp_path: Path) -> None:
    """Two run_train.sh that meet at RDZV_ENDPOINT, two ranks each, as on two machines."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    environment = dict(os.environ, NNODES="2", NGPU="2", RDZV_ENDPOINT=endpoint)
    command = ["bash", str(ROOT / "run_train.sh"), "--training.steps=2", f"--dump_folder={tmp_path}"]
    nodes = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
