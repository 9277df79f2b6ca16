"""torchtitan's own trainer, configured by its own command line, with our layer in its models."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
from torchtitan.config import ConfigManager

from tests.ranks import RankContext, RankError, run_ranks
from tests.training import train
from titan_moe.override import AdoptedMoE

CONFIGS = Path(__file__).parent.parent / "train_configs"
TIMEOUT_S = 240.0
STEPS = 3
REGISTRY = "tests.stock_registry"
OURS = ("--override.imports", "titan_moe.override.moe")
PER_SLOT = ("--override.imports", 'titan_moe.override.moe={"dispatcher":"deepep","combine":"per_slot"}')
EP2_TP2 = ("--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=2")


def train_stock(ctx: RankContext, config_name: str, argv: list[str]) -> dict[str, Any]:
    """What torchtitan's train.py does between its logging and its exit."""
    gc.collect()
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    config: Any = ConfigManager().parse_args(["--module", REGISTRY, "--config", config_name, *argv])
    trainer = config.build()
    layers = [m for m in trainer.model_parts[0].modules() if isinstance(m, AdoptedMoE)]
    try:
        trainer.train()
    finally:
        trainer.close()
    lines = (Path(config.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return {
        "records": [json.loads(line) for line in lines],
        "trainer": f"{type(trainer).__module__}.{type(trainer).__name__}",
        "adopted": len(layers),
        "expert_bias": [layer.expert_bias_E.clone() for layer in layers],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs live; they start from one seed."""
    return tmp_path_factory.mktemp("override")


COMMON = ("--debug.no-enable_structured_logging", "--debug.seed=42")


def _argv(folder: Path, name: str, *overrides: str) -> list[str]:
    return [f"--dump_folder={folder / name}", *COMMON, f"--training.steps={STEPS}", *overrides]


def _ours(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    batch = "--training.local_batch_size=4"
    argv = [str(CONFIGS / "debug_local.toml"), *_argv(folder, name, batch, "--moe.dispatcher=all_to_all")]
    return run_ranks(train, 4, [*argv, *overrides], timeout_s=TIMEOUT_S)[0]


def _stock(folder: Path, name: str, *overrides: str, config: str = "debug") -> dict[str, Any]:
    return run_ranks(train_stock, 4, config, _argv(folder, name, *overrides), timeout_s=TIMEOUT_S)[0]


@pytest.fixture(scope="module")
def adopted(folder: Path) -> dict[str, Any]:
    """torchtitan's trainer with our layer, on TP2 x EP2."""
    return _stock(folder, "adopted", *EP2_TP2, *OURS)


def _numbers(run: dict[str, Any]) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in run["records"]]


class TestAdopted:
    def test_follows_our_own_run_bitwise(self, folder: Path, adopted: dict[str, Any]) -> None:
        """EP and TP; the balance of experts is torchtitan's hook's."""
        ours = _ours(folder, "ours", *EP2_TP2)
        assert (adopted["trainer"], adopted["adopted"]) == ("torchtitan.trainer.Trainer", 2)
        assert len(_numbers(ours)) == STEPS
        assert _numbers(adopted) == _numbers(ours)
        for bias_E, theirs_E in zip(adopted["expert_bias"], ours["expert_bias"].values(), strict=True):
            assert bias_E.abs().max() > 0
            assert bias_E.equal(theirs_E)

    @pytest.mark.slow
    def test_all_rows_back_follow_too(self, folder: Path, adopted: dict[str, Any]) -> None:
        per_slot = _stock(folder, "per-slot", *EP2_TP2, *PER_SLOT)
        assert _numbers(per_slot) == _numbers(adopted)

    def test_without_the_flag_it_is_another_layer(self, folder: Path, adopted: dict[str, Any]) -> None:
        """The control: torchtitan's own layer rounds otherwise."""
        stock = _stock(folder, "stock", *EP2_TP2)
        assert stock["adopted"] == 0
        assert _numbers(stock) != _numbers(adopted)

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["selective", "full"])
    def test_checkpointed_blocks_without_tp_and_ep(self, folder: Path, mode: str) -> None:
        """torchtitan's hook halves the counts of blocks that it recomputes."""
        ours = _ours(folder, f"ours-{mode}", f"--activation_checkpoint.mode={mode}")
        adopted = _stock(folder, f"adopted-{mode}", *OURS, config=f"debug_{mode}_ac")
        assert _numbers(adopted) == _numbers(ours)
        for bias_E, theirs_E in zip(adopted["expert_bias"], ours["expert_bias"].values(), strict=True):
            assert bias_E.equal(theirs_E)

    @pytest.mark.parametrize("backend", ["spmd_types", "full_dtensor"])
    def test_another_spmd_backend_is_refused(self, folder: Path, backend: str) -> None:
        with pytest.raises(RankError, match=r"add --parallelism\.spmd_backend partial_dtensor"):
            _stock(folder, f"refused-{backend}", *OURS, f"--parallelism.spmd_backend={backend}")
