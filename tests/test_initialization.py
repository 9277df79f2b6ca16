"""The same seed gives the same weights on every mesh, and the distributions are those of torchtitan."""

import copy
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchtitan.models.common.config_utils import _fused_qkv_param_init
from torchtitan.protocols.model import BaseModel

from tests.matrix_cell_run import CONFIG, QUIET, TIMEOUT_S
from tests.matrix_cells import CELLS, Cell
from tests.ranks import RankContext, run_ranks
from tests.training import train
from titan_moe.layer.names import plain_name
from titan_moe.models import MODELS, build_spec
from titan_moe.parallel import initialization
from titan_moe.parallel.blocks import Draw
from titan_moe.parallel.initialization import InitializationError, drawn_by_name
from titan_moe.plan.rehearsal import Rehearsal, fake_world
from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

FP32, BF16 = "--training.dtype=float32", "--training.dtype=bfloat16"


def equal_blocks(weight: torch.Tensor) -> bool:
    """Whether two rows or two columns, in any dim, are the same."""
    return any(weight.unique(dim=dim).shape[dim] < weight.shape[dim] for dim in range(weight.dim()))


def first_weights(ctx: RankContext, argv: list[str], planted: str = "") -> dict[str, tuple[str, bool]]:
    """Of this rank's stages, when the trainer is built: a hash of the gathered bits, and ``equal_blocks``.

    Args:
        planted: "by rank" is torchtitan's own initialisation; "no block" draws a shard from one stream.
    """
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    model: Any = job.trainer.model_spec.model  # type: ignore[union-attr]
    model.layers = model.layers[:3]
    initialization.draw_models_by_name()
    undo = pytest.MonkeyPatch()
    if planted == "by rank":
        undo.setattr(BaseModel, "init_weights", BaseModel.init_weights.__wrapped__)
        undo.setattr("titan_moe.trainer.train.draw_models_by_name", lambda: None)
    elif planted == "no block":
        undo.setattr(initialization, "fill", _without_blocks)
    try:
        trainer = Trainer(Trainer.Config.of(job))
    finally:
        undo.undo()
    found = {}
    for part in trainer.model_parts:
        for name, param in part.named_parameters():
            whole: Any = param.detach().full_tensor() if isinstance(param, DTensor) else param.detach()
            digest = hashlib.sha256(whole.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            small = whole.dim() < 2 or whole.numel() > 2**20  # the largest take long to sort
            found[plain_name(name)] = digest, not small and equal_blocks(whole)
    trainer.close()
    return found


def _without_blocks(tensor: torch.Tensor, draw: Draw) -> None:
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    seed = int.from_bytes(
        hashlib.sha256(f"{draw.seed} {draw.name} {draw.number}".encode()).digest()[:4], "big"
    )
    local.normal_(draw.shift, draw.scale, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def one_rank() -> dict[tuple[str, ...], dict[str, tuple[str, bool]]]:
    """By what is trained and in which type; filled as it is needed."""
    return {}


def _argv(*flags: str, folder: Path) -> list[str]:
    return [CONFIG, f"--dump_folder={folder}", QUIET, *flags]


def _meshes() -> list[Any]:
    """One cell of the matrix for each mesh, model and number of stages, in both types."""
    alike = {(c.ranks, c.mesh, c.model, c.schedule if c.pp > 1 else ""): c for c in reversed(CELLS)}
    in_ci = {"FSDP2 TP2 EP2", "PP2 TP2 EP2 ZBVZeroBubble"}
    return [
        pytest.param(
            dataclasses.replace(cell, compiled="", dtype="float32", validate=False),
            dtype,
            id=f"{cell.model}-{cell.mesh}-{cell.schedule if cell.pp > 1 else ''}-{dtype.split('=')[1]}",
            marks=[]
            if cell.model == "deepseek_v3"
            and f"{cell.mesh} {cell.schedule if cell.pp > 1 else ''}".strip() in in_ci
            else [pytest.mark.slow],
        )
        for cell in alike.values()
        for dtype in (FP32, BF16)
    ]


@pytest.mark.parametrize(("cell", "dtype"), _meshes())
def test_every_mesh_starts_as_one_rank(cell: Cell, dtype: str, one_rank: Any, tmp_path: Path) -> None:
    key = cell.model, dtype
    if key not in one_rank:
        alone = _argv(f"--model.name={cell.model}", dtype, folder=tmp_path)
        one_rank[key] = run_ranks(first_weights, 1, alone, timeout_s=TIMEOUT_S)[0]
        assert not [name for name, (_, equal) in one_rank[key].items() if equal]
    argv = _argv(*cell.flags, dtype, folder=tmp_path)
    ranks = run_ranks(first_weights, cell.ranks, argv, timeout_s=TIMEOUT_S, in_step=cell.pp == 1)
    assert set().union(*ranks) == set(one_rank[key]), "every parameter is on some stage"
    assert [
        f"rank {r} {n}" for r, found in enumerate(ranks) for n in found if found[n] != one_rank[key][n]
    ] == []


@pytest.mark.parametrize("planted", ["by rank", "no block"])
def test_a_planted_fault_is_seen(planted: str, tmp_path: Path) -> None:
    """The controls: torchtitan's own initialisation on a CPU, and a stream keyed by the name alone."""
    cell = next(c for c in CELLS if (c.mesh, c.ranks, c.model) == ("FSDP2 TP2 EP2", 4, "deepseek_v3"))
    argv = _argv(*cell.flags, folder=tmp_path)
    found = run_ranks(first_weights, 4, argv, planted, timeout_s=TIMEOUT_S)[0]
    right = run_ranks(first_weights, 1, _argv(folder=tmp_path), timeout_s=TIMEOUT_S)[0]
    experts = "layers.1.moe.routed_experts.inner_experts.w1_EFD"
    assert found[experts][0] != right[experts][0]
    assert found[experts][1]
    assert found["layers.1.moe.router.gate.weight"][1]


def draws_on_meta(argv: list[str], world_size: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 0 would draw for the first layers of a model that no machine here can hold, in order."""
    draws = []

    def note(self: Any, func: Any, tensor: torch.Tensor, *bounds: float) -> None:
        name = self._name_of(func, tensor)
        draws.append((name, self.num_draws[name], func, bounds, tuple(tensor.shape), tensor.dtype))
        self.num_draws[name] += 1

    with monkeypatch.context() as patch, fake_world(world_size):
        patch.setattr(initialization._ByName, "_fill", note)
        # It does nothing on meta; where there are numbers, its first draw is this one.
        patch.setattr(nn.init, "_no_grad_trunc_normal_", lambda t, mean, std, *_, **__: t.normal_(mean, std))
        config: Any = load(argv, world_size=world_size).trainer
        config.model_spec.model.layers = config.model_spec.model.layers[:5]
        model = Rehearsal(config, world_size).model.to_empty(device="meta")
        with torch.no_grad(), drawn_by_name(model, seed=0):
            model.init_states()
        constant = {plain_name(n) for n, p in model.named_parameters() if p.dim() < 2}
        assert {name for name, *_ in draws} | constant == {plain_name(n) for n, _ in model.named_parameters()}
    return draws


@pytest.mark.parametrize(
    ("config", "world_size"),
    [("deepseek_v3_16b", 8), ("qwen3_30b_a3b", 8), ("deepseek_v3_671b", 512)],
)
def test_a_real_configs_draws(config: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its mesh, a rank fills each parameter by the draws of one rank alone, so that the weights agree."""
    argv = [f"train_configs/{config}.toml"]
    alone = ["--parallelism.tensor_parallel_degree=1", "--parallelism.expert_parallel_degree=1"]
    on_mesh = draws_on_meta(argv, world_size, monkeypatch)
    assert on_mesh == draws_on_meta([*argv, *alone], 1, monkeypatch)
    assert len(set(on_mesh)) == len(on_mesh)


@pytest.mark.slow
def test_a_seed_checkpoint_starts_the_same_run(tmp_path: Path) -> None:
    seed = ("--checkpoint.enable", "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=.")
    run_ranks(train, 1, _argv(*seed, folder=tmp_path / "seed"), timeout_s=TIMEOUT_S)
    mesh = ("--parallelism.tensor_parallel_degree=2", "--training.local_batch_size=6", "--training.steps=1")
    start = ("--checkpoint.enable", f"--checkpoint.initial_load_path={tmp_path / 'seed' / 'step-0'}")
    runs = [
        run_ranks(train, 4, _argv(*mesh, *more, folder=tmp_path / name), timeout_s=TIMEOUT_S)[0]["records"]
        for name, more in (("from-checkpoint", start), ("from-seed", ()))
    ]
    assert [(r["loss"], r["grad_norm"]) for r in runs[0]] == [(r["loss"], r["grad_norm"]) for r in runs[1]]


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A debug model as torchtitan initialises it on one rank, by name, and by name from another seed."""
    model: Any = build_spec(request.param, "debugmodel").model
    model.layers = model.layers[:3]
    theirs: Any = model.build()
    ours, other = copy.deepcopy(theirs), copy.deepcopy(theirs)
    with torch.no_grad():
        theirs.init_states()
        for found, seed in ((ours, 5), (other, 6)):
            with drawn_by_name(found, seed=seed):
                found.init_states()
    return theirs, ours, other


class TestDistribution:
    def test_as_torchtitans_initialiser(self, pair: Any) -> None:
        """Mean and spread within 5 standard errors, the same truncation, and Kolmogorov-Smirnov."""
        compared = 0
        for (name, theirs), ours in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
            a, b = (tensor.detach().flatten()[:1_000_000].double() for tensor in (theirs, ours))
            if (a == a[0]).all():
                assert torch.equal(a, b), name
                continue
            compared += 1
            std, n = a.std().item(), a.numel()
            assert abs(b.mean() - a.mean()) < 5 * std * (2 / n) ** 0.5, name
            assert abs(b.std() - std) < 5 * std / n**0.5, name
            assert abs(b.abs().max() - a.abs().max()) < 1.5 * std, name
            p = scipy.stats.ks_2samp(a[:100_000].numpy(), b[:100_000].numpy()).pvalue
            assert p > 1e-4, (name, p)
        assert compared == sum(p.dim() > 1 for p in pair[0].parameters())

    def test_truncated_where_torchtitan_truncates(self, pair: Any) -> None:
        """lm_head of both families is cut at three standard deviations, or not at all."""
        theirs, ours = (model.lm_head.weight.detach().abs().max().item() for model in pair[:2])
        limit = 3 * pair[0].lm_head.weight.shape[1] ** -0.5
        assert (theirs <= limit) == (ours <= limit)

    def test_another_seed_changes_every_random_parameter(self, pair: Any) -> None:
        named = zip(pair[1].named_parameters(), pair[2].parameters(), strict=True)
        same = [name for (name, a), b in named if a.dim() > 1 and (a == b).float().mean() > 1e-3]
        assert same == []

    def test_no_two_rows_or_columns(self, pair: Any) -> None:
        random = [(n, p) for n, p in pair[1].named_parameters() if p.dim() > 1 and p.numel() <= 2**20]
        assert random
        assert [name for name, p in random if equal_blocks(p.detach())] == []


class _Odd(nn.Module):
    """A parameter and an initialiser for it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 12)
        self.other = nn.Linear(20, 12)


class TestAnyModule:
    def test_order_and_neighbours_do_not_matter(self) -> None:
        first, second = _Odd(), _Odd()
        with drawn_by_name(first, seed=3):
            first.linear.reset_parameters()
            first.other.reset_parameters()
        with drawn_by_name(second, seed=3):
            second.linear.reset_parameters()
        assert torch.equal(first.linear.weight, second.linear.weight)
        assert torch.equal(first.linear.bias, second.linear.bias)
        assert not torch.equal(first.linear.weight, first.other.weight)

    def test_trunc_normal_draws_again(self) -> None:
        module = _Odd()
        with drawn_by_name(module, seed=3):
            nn.init.trunc_normal_(module.linear.weight, std=1.0, a=-1.2, b=1.2)
        assert module.linear.weight.abs().max() <= 1.2
        assert not equal_blocks(module.linear.weight.detach())

    def test_plain_fsdp_and_tp(self) -> None:
        expected = _Odd()
        with drawn_by_name(expected, seed=3):
            _reset(expected)
        wanted = {name: p.detach() for name, p in expected.named_parameters()}
        for found in run_ranks(shard_and_reset, 4):
            assert found.keys() == wanted.keys()
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []

    @pytest.mark.parametrize(
        ("do", "words"),
        [
            (
                lambda m: m.linear.weight.bernoulli_(0.5),
                "bernoulli_.* draws random numbers that would differ",
            ),
            (
                lambda m: torch.empty(3, 4).normal_(),
                r"normal_.* a plain tensor of shape \(3, 4\) fills a tensor",
            ),
            (lambda m: torch.randn(4), "randn.* draws random numbers that would differ"),
            (lambda m: m.linear.weight[:6].normal_(), r"of shape \(6, 20\) fills a tensor of which"),
        ],
    )
    def test_what_is_not_known_by_name_is_refused(self, do: Any, words: str) -> None:
        module = _Odd()
        with torch.no_grad(), drawn_by_name(module, seed=0), pytest.raises(InitializationError, match=words):
            do(module)

    def test_a_generator_of_ones_own_on_a_plain_tensor(self) -> None:
        with drawn_by_name(_Odd(), seed=0):
            own = torch.empty(3).normal_(generator=torch.Generator().manual_seed(1))
        assert torch.equal(own, torch.empty(3).normal_(generator=torch.Generator().manual_seed(1)))

    def test_a_shard_behind_dtensors_back_is_refused(self) -> None:
        assert all("a plain tensor" in said and "weight: " in said for said in run_ranks(fill_a_shard, 2))

    def test_a_fused_weight_of_three_draws(self) -> None:
        """torchtitan's fused QKV initialises tensors of its own and copies them."""
        whole = run_ranks(fused_weight, 1)[0]
        assert all(torch.equal(found, whole) for found in run_ranks(fused_weight, 4))
        assert not equal_blocks(whole)

    def test_tables_are_given_back(self) -> None:
        model: Any = build_spec("deepseek_v3", "debugmodel").model
        model.layers = model.layers[:2]
        built = model.build()
        before = {m: m._param_init for m in built.modules()}
        with pytest.raises(ZeroDivisionError), drawn_by_name(built, seed=0):
            _ = 1 / 0
        assert all(m._param_init is table for m, table in before.items())


def _reset(module: Any) -> None:
    for part in (module.linear, module.other):
        part.reset_parameters()


def shard_and_reset(ctx: RankContext) -> dict[str, torch.Tensor]:
    """One linear layer over TP, everything over FSDP, made on meta; gathered."""
    mesh = ctx.device_mesh((2, 2), ("fsdp", "tp"))
    with torch.device("meta"):
        module = _Odd()
    module.linear.weight = nn.Parameter(distribute_tensor(module.linear.weight, mesh["tp"], [Shard(1)]))
    module.linear.bias = nn.Parameter(distribute_tensor(module.linear.bias, mesh["tp"]))
    fully_shard(module.linear, mesh=mesh["fsdp"])
    fully_shard(module.other, mesh=mesh["fsdp"])
    module.to_empty(device="cpu")
    with drawn_by_name(module, seed=3):
        _reset(module)
    return {name: p.detach().full_tensor() for name, p in module.named_parameters()}


def fill_a_shard(ctx: RankContext) -> str:
    """What is said where an initialiser fills the local part of a sharded parameter."""
    built: Any = build_spec("deepseek_v3", "debugmodel").model.lm_head.build()
    mesh = ctx.device_mesh((2,), ("fsdp",))
    fully_shard(built, mesh=mesh)
    built._param_init = {"weight": lambda weight: weight.to_local().normal_()}
    with torch.no_grad(), drawn_by_name(built, seed=0):
        try:
            built.init_states()
        except InitializationError as error:
            return str(error)
    return "nothing"


def fused_weight(ctx: RankContext) -> torch.Tensor:
    """Of 4 query and 2 key and value heads, sharded over its rows; gathered."""
    built: Any = build_spec("deepseek_v3", "debugmodel").model.lm_head.build()
    built.weight = nn.Parameter(torch.empty(64, 24))
    table = {"weight": nn.init.normal_}
    built._param_init = _fused_qkv_param_init(table, n_heads=4, n_kv_heads=2, head_dim=8)
    if ctx.world_size > 1:
        fully_shard(built, mesh=ctx.device_mesh((ctx.world_size,), ("fsdp",)))
    with torch.no_grad(), drawn_by_name(built, seed=0):
        built.init_states()
    weight: Any = built.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
