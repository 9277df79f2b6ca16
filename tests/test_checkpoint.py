"""Checkpoints: resumed on the same mesh and on others, cut short, damaged."""

import gc
import hashlib
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from tests.ranks import RankContext, RankError, run_ranks
from tests.training import NUM_LAYERS, train
from titan_moe.checkpoint import CheckpointManager, damage, unfinished
from titan_moe.config import load
from titan_moe.train import Trainer

CONFIG = str(Path(__file__).parent.parent / "train_configs" / "debug_local.toml")
TIMEOUT_S = 240.0
EP2_TP2 = (
    "--parallelism.tensor_parallel_degree=2",
    "--parallelism.expert_parallel_degree=2",
    "--moe.dispatcher=all_to_all",
    "--training.local_batch_size=4",
)
OTHERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one-rank": (1, ("--training.local_batch_size=8",)),
    "fsdp4": (4, ("--training.local_batch_size=2",)),
    "ep4": (4, ("--training.local_batch_size=2", "--parallelism.expert_parallel_degree=4")),
    "hsdp-ep2": (
        4,
        (
            "--training.local_batch_size=2",
            "--parallelism.expert_parallel_degree=2",
            "--parallelism.data_parallel_replicate_degree=2",
        ),
    ),
    "tp4": (4, ("--training.local_batch_size=8", "--parallelism.tensor_parallel_degree=4")),
}


def _argv(folder: Path, name: str, *overrides: str, checkpoints: Path) -> list[str]:
    return [
        CONFIG,
        f"--dump_folder={folder / name}",
        "--debug.no-enable_structured_logging",
        "--training.mixed_precision_param=float32",
        "--training.seq_len=31",
        "--training.global_batch_size=8",
        "--checkpoint.enable",
        "--checkpoint.interval=2",
        f"--checkpoint.folder={checkpoints}",
        "--moe.dispatcher=all_to_all",
        *overrides,
    ]


def fingerprint(_ctx: RankContext, argv: list[str]) -> dict[str, Any]:
    """What is loaded: hashes of every whole tensor of the model and the optimizer, expert by expert."""
    gc.collect()
    os.environ |= {"RANK": str(_ctx.rank), "LOCAL_RANK": str(_ctx.rank), "WORLD_SIZE": str(_ctx.world_size)}
    job = load(argv, world_size=_ctx.world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:NUM_LAYERS]
    trainer = Trainer(Trainer.Config.of(job))
    try:
        trainer.checkpointer.load(step=job.trainer.checkpoint.load_step)
        state = trainer.model_parts[0].state_dict() | trainer.optimizers.state_dict()
        hashes = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                parts = whole.unbind() if whole.dim() == 3 else [whole]  # experts have three dims
                plain = name.replace("_checkpoint_wrapped_module.", "")
                for number, part in enumerate(parts):
                    data = part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                    hashes[f"{plain}[{number}]"] = hashlib.sha256(data).hexdigest()
        return {"step": trainer.step, "hashes": hashes}
    finally:
        trainer.close()


def killed_while_saving(ctx: RankContext, argv: list[str]) -> None:
    """Every rank writes its part of the checkpoint of step 4; rank 0 dies before it writes what is where."""
    finish = FileSystemWriter.finish

    def die(self: Any, *args: Any) -> None:
        if str(self.path).endswith("step-4"):
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self, *args)

    FileSystemWriter.finish = die  # type: ignore[method-assign]
    try:
        train(ctx, argv)
    finally:
        FileSystemWriter.finish = finish  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs live. ``straight`` has done 4 steps on TP2 x EP2 and saved steps 2 and 4."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Any]:
    """The run that is never interrupted; it saves asynchronously."""
    start = "--checkpoint.async_mode=async"
    argv = _argv(folder, "straight", *EP2_TP2, "--training.steps=4", start, checkpoints=folder / "saved")
    return run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]


def _only_step_2(folder: Path, name: str) -> Path:
    """A copy of what ``straight`` had saved half way."""
    shutil.copytree(folder / "saved" / "step-2", folder / name / "step-2")
    return folder / name


def _numbers(run: dict[str, Any]) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in run["records"]]


IN_CI = ("one-rank",)


class TestResume:
    def test_on_the_same_mesh_the_bits_go_on(self, folder: Path, straight: dict[str, Any]) -> None:
        """Losses, gradient norms, the data's position and the expert bias."""
        saved = _only_step_2(folder, "resumed-saved")
        argv = _argv(folder, "resumed", *EP2_TP2, "--training.steps=4", checkpoints=saved)
        resumed = run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]
        assert _numbers(resumed) == _numbers(straight)[2:]
        assert [step for step, *_ in _numbers(resumed)] == [3, 4]
        assert straight["expert_bias"].keys() == resumed["expert_bias"].keys()
        for name, bias_E in straight["expert_bias"].items():
            assert bias_E.equal(resumed["expert_bias"][name])

    @pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=[] if n in IN_CI else [pytest.mark.slow]) for n in OTHERS],
    )
    def test_another_mesh_loads_the_same_state(
        self, folder: Path, straight: dict[str, Any], name: str
    ) -> None:
        """Every weight and Adam moment of every expert, bit for bit."""
        assert len(straight["records"]) == 4
        ranks, mesh = OTHERS[name]
        options = ("--checkpoint.load_only", "--checkpoint.load_step=2")
        here = _argv(folder, "same", *EP2_TP2, *options, checkpoints=folder / "saved")
        there = _argv(folder, name, *mesh, *options, checkpoints=folder / "saved")
        same = run_ranks(fingerprint, 4, here, timeout_s=TIMEOUT_S)[0]
        other = run_ranks(fingerprint, ranks, there, timeout_s=TIMEOUT_S)[0]
        assert (same["step"], other["step"]) == (2, 2)
        experts = [name for name in other["hashes"] if "w1_EFD" in name and ".step" not in name]
        assert len(experts) == 2 * 8 * 3  # layers, experts; weight and two moments
        assert len(set(other["hashes"].values())) > 100
        assert other["hashes"] == same["hashes"]

    @pytest.mark.slow
    def test_and_trains_on(self, folder: Path, straight: dict[str, Any]) -> None:
        saved = _only_step_2(folder, "moved-saved")
        ranks, mesh = OTHERS["ep4"]
        argv = _argv(folder, "moved", *mesh, "--training.steps=4", checkpoints=saved)
        moved = run_ranks(train, ranks, argv, timeout_s=TIMEOUT_S)[0]["records"]
        expected = [record["loss"] for record in straight["records"][2:]]
        assert [record["loss"] for record in moved] == pytest.approx(expected, rel=1e-6)


class TestCutShort:
    def test_a_killed_rank_leaves_the_one_before(self, folder: Path, straight: dict[str, Any]) -> None:
        saved = _only_step_2(folder, "killed-saved")
        argv = _argv(folder, "killed", *EP2_TP2, "--training.steps=4", checkpoints=saved)
        with pytest.raises(RankError, match="rank 0"):
            run_ranks(killed_while_saving, 4, argv, timeout_s=60.0)
        assert not (saved / "step-4" / ".metadata").exists()
        assert unfinished(saved, newer_than=2) == [4]
        again = run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)[0]
        assert [r["loss"] for r in again["records"]] == [r["loss"] for r in straight["records"][2:]]
        assert (saved / "step-4" / ".metadata").exists()

    def test_what_is_unfinished(self, tmp_path: Path) -> None:
        for step, files in {1: [".metadata", "a"], 2: ["a"], 3: [], 10: ["b"]}.items():
            (tmp_path / f"step-{step}").mkdir()
            for file in files:
                (tmp_path / f"step-{step}" / file).touch()
        assert unfinished(tmp_path, newer_than=1) == [2, 3, 10]
        assert unfinished(tmp_path, newer_than=3) == [10]
        assert unfinished(tmp_path / "nope", newer_than=-1) == []

    def test_says_what_it_continues_from(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        manager: Any = object.__new__(CheckpointManager)
        (tmp_path / "step-4").mkdir()
        assert manager._find_load_step(str(tmp_path)) == -1
        (tmp_path / "step-2").mkdir()
        (tmp_path / "step-2" / ".metadata").touch()
        assert manager._find_load_step(str(tmp_path)) == 2
        first, second = caplog.messages
        assert first.endswith("step 4 has no .metadata, its save did not finish; there is none before it")
        assert second.endswith("its save did not finish; continuing from step 2")


def _flip(file: Path) -> None:
    """One bit of a tensor's numbers."""
    data = bytearray(file.read_bytes())
    longest = max(range(0, len(data) - 64, 64), key=lambda start: len(set(data[start : start + 64])))
    data[longest + 32] ^= 1
    file.write_bytes(data)


def _halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("*.distcp", Path.unlink, r"distcp: missing"),
    "truncated": ("*.distcp", _halve, r"distcp: truncated, \d+ of \d+ bytes"),
    "a bit": ("*.distcp", _flip, r"distcp: damaged between bytes \d+ and \d+"),
    "no metadata": (".metadata", Path.unlink, r"no .metadata, so its save did not finish"),
    "half the metadata": (".metadata", _halve, r".metadata: truncated or damaged"),
}


class TestDamage:
    @pytest.mark.parametrize("kind", DAMAGES)
    def test_is_found_and_named(self, tmp_path: Path, kind: str) -> None:
        state = {f"w{n}": torch.randn(64, 64) for n in range(8)} | {"position": {"step": 3}}
        dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
        assert damage(tmp_path, 0, 1) is None
        pattern, damage_it, words = DAMAGES[kind]
        damage_it(next(tmp_path.glob(pattern)))
        found = [damage(tmp_path, rank, 3) for rank in range(3)]
        assert any(one is not None and re.search(words, one) for one in found), found

    def test_is_refused_by_every_rank(self, folder: Path, straight: dict[str, Any]) -> None:
        assert len(straight["records"]) == 4
        saved = _only_step_2(folder, "damaged-saved")
        file = max((saved / "step-2").glob("*.distcp"), key=lambda f: f.stat().st_size)
        _flip(file)
        argv = _argv(folder, "damaged", *EP2_TP2, "--checkpoint.load_only", checkpoints=saved)
        with pytest.raises(RankError) as refused:
            run_ranks(fingerprint, 4, argv, timeout_s=TIMEOUT_S)
        said = str(refused.value)
        assert f"{file}: damaged between bytes" in said
        assert all(f"rank {rank} of 4: CheckpointError" in said for rank in range(4))
