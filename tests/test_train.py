"""The trainer: the same run twice, dispatchers of equal bits, and another family. Meshes: test_matrix.py."""

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training import train

CONFIGS = Path(__file__).parent.parent / "train_configs"
TIMEOUT_S = 240.0


def _run(folder: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    argv = [
        str(CONFIGS / "debug_local.toml"),
        f"--dump_folder={folder / name}",
        "--training.steps=3",
        "--training.local_batch_size=2",
        "--debug.no-enable_structured_logging",
        *EP2_TP2,
        *overrides,
    ]
    return run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]["records"]


def _bits(records: list[dict[str, Any]]) -> list[Any]:
    return [(record["loss"], record["grad_norm"], record["load"]) for record in records]


EP2_TP2 = (
    "--parallelism.tensor_parallel_degree=2",
    "--parallelism.expert_parallel_degree=2",
    "--moe.dispatcher=all_to_all",
)
PER_SLOT = ("--moe.dispatcher=deepep", "--moe.deepep.combine=per_slot")


SAVING = ("--moe.save=inputs", "--activation_checkpoint.mode=full")


@pytest.mark.parametrize("again", [pytest.param((), marks=pytest.mark.slow), SAVING], ids=["", "saving"])
def test_the_same_run_twice_has_the_same_bits(tmp_path: Path, again: tuple[str, ...]) -> None:
    """Also when the second keeps the experts' inputs only, under full recomputation besides."""
    runs = [_bits(_run(tmp_path, str(number), *more)) for number, more in enumerate([(), again])]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3


@pytest.mark.slow  # test_numerics compares the same two for a step
def test_all_rows_back_have_the_bits_of_all_to_all(tmp_path: Path) -> None:
    uneven = "--training.seq_len=127"
    runs = [_bits(_run(tmp_path, "all-to-all", uneven)), _bits(_run(tmp_path, "slots", *PER_SLOT, uneven))]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 3


def test_qwen3_learns(tmp_path: Path) -> None:
    argv = [str(CONFIGS / "qwen3_debug_ep.toml"), f"--dump_folder={tmp_path}", "--training.steps=4"]
    records = run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]["records"]
    assert records[-1]["loss"] < records[0]["loss"]
