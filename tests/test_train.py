"""The trainer from one seed checkpoint: the same numbers on every mesh, shape and recomputation mode."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import train

CONFIGS = Path(__file__).parent.parent / "train_configs"
GLOBAL_BATCH = 12  # 3 sequences on each of 4 data-parallel ranks
TIMEOUT_S = 240.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file live; ``seed`` is the checkpoint they all start from."""
    folder = tmp_path_factory.mktemp("runs")
    _run(
        folder,
        "seed",
        1,
        "--checkpoint.enable",
        "--checkpoint.create_seed_checkpoint",
        "--checkpoint.folder=.",
    )
    return folder


def _run(
    folder: Path, name: str, world_size: int, *overrides: str, gradients: str | None = None
) -> list[dict[str, Any]]:
    argv = [
        str(CONFIGS / "debug_local.toml"),
        f"--dump_folder={folder / name}",
        "--training.steps=1",
        "--debug.no-enable_structured_logging",
        *overrides,
    ]
    return run_ranks(train, world_size, argv, gradients, timeout_s=TIMEOUT_S)


def _run_from_seed(folder: Path, name: str, world_size: int, *overrides: str) -> list[dict[str, Any]]:
    """A run in fp32 from the seed checkpoint; its seq_len picks the gradients to compare with."""
    seq_len = [o.split("=")[1] for o in overrides if o.startswith("--training.seq_len=")][-1]
    return _run(
        folder,
        name,
        world_size,
        "--training.mixed_precision_param=float32",
        f"--training.global_batch_size={GLOBAL_BATCH}",
        "--checkpoint.enable",
        f"--checkpoint.initial_load_path={folder / 'seed' / 'step-0'}",
        "--checkpoint.folder=checkpoint",
        "--checkpoint.interval=1000",
        *overrides,
        gradients=str(folder / f"gradients-{seq_len}.pt"),
    )


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[int, dict[str, Any]]:
    """The reference for each sequence length: one rank, three steps, no parallelism at all."""
    return {
        seq_len: _run_from_seed(
            folder,
            f"one-{seq_len}",
            1,
            f"--training.seq_len={seq_len}",
            "--training.local_batch_size=12",
            "--training.steps=3",
        )[0]
        for seq_len in (128, 127, 2)
    }


def _assert_same(candidates: list[dict[str, Any]], reference: dict[str, Any], steps: int = 1) -> None:
    """Loss, load, expert bias, every gradient; and copies over TP with the same bits."""
    ours, theirs = candidates[0]["records"][:steps], reference["records"][:steps]
    assert len(ours) == steps
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-6)
    assert ours[0]["load"] == theirs[0]["load"]
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-4)
    for name in ("first_bias", "first_load"):
        for fqn, tensor_E in reference[name].items():
            assert torch.equal(candidates[0][name][fqn], tensor_E), (name, fqn)
    errors = candidates[0]["gradient_errors"]
    assert {name: error for name, error in errors.items() if not error <= 1e-4} == {}
    assert all(candidate["none_gradients"] == [] for candidate in candidates)
    assert all(candidate["replicas_differ"] == [] for candidate in candidates)


NO_SP = "--parallelism.no-enable-sequence-parallel"
MESHES = [
    # (TP, EP, seq_len, local batch, further)
    (1, 1, 128, 3, ()),
    (1, 2, 127, 3, ()),
    (1, 4, 128, 3, ()),
    (2, 1, 127, 6, ()),
    (2, 1, 128, 3, (NO_SP,)),
    (2, 2, 127, 3, ()),
    (2, 2, 128, 2, (NO_SP,)),
    (2, 4, 127, 6, (NO_SP,)),
    (4, 1, 127, 12, ()),
    (4, 2, 128, 3, ()),
    (4, 4, 127, 3, ()),
]
IN_CI = [m for m in MESHES if m[:3] not in ((2, 1, 128), (2, 4, 127), (4, 1, 127), (4, 2, 128))]


@pytest.mark.parametrize(
    ("tp", "ep", "seq_len", "batch", "further"),
    [
        pytest.param(
            *m,
            id=f"tp{m[0]}-ep{m[1]}-L{m[2]}-B{m[3]}{'-no-sp' if m[4] else ''}",
            marks=[] if m in IN_CI else [pytest.mark.slow],
        )
        for m in MESHES
    ],
)
def test_first_step_equals_one_rank(
    folder: Path,
    one_rank: dict[int, dict[str, Any]],
    tp: int,
    ep: int,
    seq_len: int,
    batch: int,
    further: tuple[str],
) -> None:
    candidates = _run_from_seed(
        folder,
        f"tp{tp}-ep{ep}-{seq_len}-{batch}-{len(further)}",
        4,
        f"--parallelism.tensor_parallel_degree={tp}",
        f"--parallelism.expert_parallel_degree={ep}",
        "--moe.dispatcher=" + ("all_to_all" if ep > 1 else "local"),
        f"--training.seq_len={seq_len}",
        f"--training.local_batch_size={batch}",
        *further,
    )
    _assert_same(candidates, one_rank[seq_len])


EP2_TP2 = (
    "--parallelism.tensor_parallel_degree=2",
    "--parallelism.expert_parallel_degree=2",
    "--moe.dispatcher=all_to_all",
)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_recomputation_and_eval_do_not_count(
    folder: Path, one_rank: dict[int, dict[str, Any]], mode: str
) -> None:
    validate = (
        "--validator.enable",
        "--validator.freq=1",
        "--validator.steps=1",
        "--validator.dataloader.source=stdlib",
    )
    candidates = _run_from_seed(
        folder,
        f"ac-{mode}",
        4,
        *EP2_TP2,
        f"--activation_checkpoint.mode={mode}",
        "--training.seq_len=127",
        "--training.local_batch_size=6",
        "--training.steps=3",
        *(validate if mode != "none" else ()),
    )
    _assert_same(candidates, one_rank[127], steps=3)
    for fqn, bias_E in one_rank[127]["expert_bias"].items():
        assert torch.equal(candidates[0]["expert_bias"][fqn], bias_E), fqn


def test_ranks_without_tokens_train(folder: Path, one_rank: dict[int, dict[str, Any]]) -> None:
    """L=2 over SP 4: two ranks hold no token at all, and most experts get none."""
    candidates = _run_from_seed(
        folder,
        "no-tokens",
        4,
        "--parallelism.tensor_parallel_degree=4",
        "--parallelism.expert_parallel_degree=4",
        "--moe.dispatcher=all_to_all",
        "--training.seq_len=2",
        "--training.local_batch_size=1",
        "--training.steps=5",
    )
    _assert_same(candidates, one_rank[2])
    assert len(candidates[0]["records"]) == 5


def test_the_same_run_twice_has_the_same_bits(folder: Path) -> None:
    runs = [
        _run(folder, f"twice-{again}", 4, *EP2_TP2, "--training.steps=3", "--training.local_batch_size=2")[0][
            "records"
        ]
        for again in range(2)
    ]
    bits = [[(r["loss"], r["grad_norm"], r["load"]) for r in run] for run in runs]
    assert bits[0] == bits[1]
    assert len(bits[0]) == 3


DEEPEP = "--moe.dispatcher=deepep"


@pytest.mark.slow  # test_numerics compares the same two for a step
def test_one_row_per_rank_follows_all_to_all(folder: Path, one_rank: dict[int, dict[str, Any]]) -> None:
    """fp32, from the seed checkpoint; the default way back rounds once more per rank."""
    shape = ("--training.seq_len=127", "--training.local_batch_size=3", "--training.steps=3")
    candidates = _run_from_seed(folder, "deepep", 4, *EP2_TP2, DEEPEP, *shape)
    _assert_same(candidates, one_rank[127], steps=3)


@pytest.mark.slow  # test_numerics compares the same two for a step
def test_all_rows_back_have_the_bits_of_all_to_all(folder: Path) -> None:
    shape = ("--training.steps=3", "--training.local_batch_size=2", "--training.seq_len=127")
    bits = []
    for name, further in (("all-to-all", ()), ("per-slot", (DEEPEP, "--moe.deepep.combine=per_slot"))):
        records = _run(folder, name, 4, *EP2_TP2, *further, *shape)[0]["records"]
        bits.append([(r["loss"], r["grad_norm"], r["load"]) for r in records])
    assert bits[0] == bits[1]
    assert len(bits[0]) == 3


def test_qwen3_learns(folder: Path) -> None:
    argv = [str(CONFIGS / "qwen3_debug_ep.toml"), f"--dump_folder={folder / 'qwen3'}", "--training.steps=4"]
    records = run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]["records"]
    assert records[-1]["loss"] < records[0]["loss"]
