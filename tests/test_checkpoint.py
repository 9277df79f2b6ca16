"""Checkpoints: resumed on the same mesh and on others, cut short, damaged."""

import contextlib
import functools
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from torchtitan.components import checkpointer as upstream
from torchtitan.tools.logging import logger

from tests.ranks import RankContext, RankError, run_ranks
from tests.training import NUM_LAYERS, train
from titan_moe.trainer.checkpoint import (
    CheckpointError,
    CheckpointManager,
    complete,
    damage,
    exported,
    unfinished,
)
from titan_moe.trainer.config import load
from titan_moe.trainer.train import Trainer

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "train_configs" / "debug_local.toml")
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
    "pp2-ep2": (
        4,
        (
            "--training.local_batch_size=4",
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.expert_parallel_degree=2",
        ),
    ),
}
# Where a run goes straight through: 4 ranks, saved after steps 2 and 4.
STRAIGHT: dict[str, tuple[str, ...]] = {
    "tp2-ep2": EP2_TP2,
    "pp2-interleaved": (  # two stages, and so two model parts, per rank
        "--training.local_batch_size=4",
        "--parallelism.pipeline_parallel_degree=2",
        "--parallelism.pipeline_parallel_schedule=Interleaved1F1B",
    ),
    "pp2-ep2": OTHERS["pp2-ep2"][1],
    "cp2-ep2": (
        "--training.local_batch_size=4",
        "--training.seq_len=256",
        "--parallelism.context_parallel_degree=2",
        "--parallelism.expert_parallel_degree=2",
    ),
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


def _trainer(ctx: RankContext, argv: list[str]) -> Trainer:
    gc.collect()
    os.environ |= {"RANK": str(ctx.rank), "LOCAL_RANK": str(ctx.rank), "WORLD_SIZE": str(ctx.world_size)}
    job = load(argv, world_size=ctx.world_size)
    model: Any = job.trainer.model_spec.model
    model.layers = model.layers[:NUM_LAYERS]
    return Trainer(Trainer.Config.of(job))


def finish(ctx: RankContext, argv: list[str]) -> list[dict[str, Any]]:
    """Trains to the end; the records of metrics.jsonl. For models without expert bias, too."""
    trainer = _trainer(ctx, argv)
    try:
        trainer.train()
    finally:
        trainer.close()
    lines = (Path(trainer.config.dump_folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def fingerprint(ctx: RankContext, argv: list[str]) -> dict[str, Any]:
    """What is loaded: hashes of every whole tensor of the model and the optimizer, expert by expert.

    Under PP, of this rank's stages.
    """
    trainer = _trainer(ctx, argv)
    try:
        trainer.checkpointer.load(step=trainer.config.checkpoint.load_step)
        state = trainer.optimizers.state_dict()
        for part in trainer.model_parts:
            state |= part.state_dict()
        hashes = {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                parts = whole.unbind() if whole.dim() == 3 else [whole]  # experts have three dims
                plain = name.replace("_checkpoint_wrapped_module.", "")
                for number, part in enumerate(parts):
                    data = part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
                    hashes[f"{plain}[{number}]"] = hashlib.sha256(data).hexdigest()
        return {"step": trainer.step, "hashes": hashes, "parts": len(trainer.model_parts)}
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
    """Where the runs live. ``saved-tp2-ep2`` has steps 2 and 4 of the run on TP2 x EP2."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def straight_on(folder: Path) -> Callable[[str], list[dict[str, Any]]]:
    """Per mesh the run that is never interrupted, by rank; it saves asynchronously."""

    @functools.cache
    def run(mesh: str) -> list[dict[str, Any]]:
        options = ("--training.steps=4", "--checkpoint.async_mode=async")
        argv = _argv(
            folder, f"straight-{mesh}", *STRAIGHT[mesh], *options, checkpoints=folder / f"saved-{mesh}"
        )
        return run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)

    return run


@pytest.fixture(scope="module")
def straight(straight_on: Callable[[str], list[dict[str, Any]]]) -> dict[str, Any]:
    """The one on TP2 x EP2, which most tests continue."""
    return straight_on("tp2-ep2")[0]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Callable[[str, int, tuple[str, ...]], dict[str, str]]:
    """Fingerprints of step 2 of a straight run on ``ranks`` ranks with ``mesh``: all stages of all ranks."""

    @functools.cache
    def load_there(source: str, ranks: int, mesh: tuple[str, ...]) -> dict[str, str]:
        options = ("--checkpoint.load_only", "--checkpoint.load_step=2")
        argv = _argv(folder, "there", *mesh, *options, checkpoints=folder / f"saved-{source}")
        hashes: dict[str, str] = {}
        for rank in run_ranks(fingerprint, ranks, argv, timeout_s=TIMEOUT_S):
            assert rank["step"] == 2
            assert rank["parts"] == (2 if "Interleaved1F1B" in str(mesh) else 1)
            for name, value in rank["hashes"].items():
                assert hashes.setdefault(name, value) == value, name
        return hashes

    return load_there


def _only_step_2(folder: Path, name: str, *, source: str = "tp2-ep2") -> Path:
    """A copy of what a straight run had saved half way."""
    shutil.copytree(folder / f"saved-{source}" / "step-2", folder / name / "step-2")
    return folder / name


def _numbers(run: dict[str, Any]) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in run["records"]]


def _slow_but(names: Iterable[str], *in_ci: str) -> list[Any]:
    return [pytest.param(n, marks=[] if n in in_ci else [pytest.mark.slow]) for n in names]


class TestResume:
    @pytest.mark.parametrize("mesh", _slow_but(STRAIGHT, "tp2-ep2", "pp2-interleaved"))
    def test_on_the_same_mesh_the_bits_go_on(
        self, folder: Path, straight_on: Callable[[str], list[dict[str, Any]]], mesh: str
    ) -> None:
        """Losses, gradient norms, the data's position and the expert bias."""
        straight = straight_on(mesh)
        saved = _only_step_2(folder, f"resumed-saved-{mesh}", source=mesh)
        argv = _argv(folder, f"resumed-{mesh}", *STRAIGHT[mesh], "--training.steps=4", checkpoints=saved)
        resumed = run_ranks(train, 4, argv, timeout_s=TIMEOUT_S)
        assert _numbers(resumed[0]) == _numbers(straight[0])[2:]
        assert [step for step, *_ in _numbers(resumed[0])] == [3, 4]
        biases = 0
        for before, after in zip(straight, resumed, strict=True):
            assert before["expert_bias"].keys() == after["expert_bias"].keys()
            for name, bias_E in before["expert_bias"].items():
                assert bias_E.any()
                assert bias_E.equal(after["expert_bias"][name])
                biases += 1
        assert biases == (4 if mesh.startswith("pp2") else 8)  # of two layers, on each rank that has them

    @pytest.mark.parametrize("name", _slow_but(OTHERS, "one-rank"))
    def test_another_mesh_loads_the_same_state(
        self, straight: dict[str, Any], loaded: Callable[..., dict[str, str]], name: str
    ) -> None:
        """Every weight and Adam moment of every expert, bit for bit."""
        assert len(straight["records"]) == 4
        self._assert_the_same(loaded("tp2-ep2", 4, EP2_TP2), loaded("tp2-ep2", *OTHERS[name]))

    @pytest.mark.slow
    def test_stages_are_put_together_again(
        self,
        straight_on: Callable[[str], list[dict[str, Any]]],
        loaded: Callable[..., dict[str, str]],
    ) -> None:
        """From four stages on two ranks to none."""
        mesh = "pp2-interleaved"
        assert len(straight_on(mesh)[0]["records"]) == 4
        self._assert_the_same(loaded(mesh, 4, STRAIGHT[mesh]), loaded(mesh, *OTHERS["ep4"]))

    def _assert_the_same(self, here: dict[str, str], there: dict[str, str]) -> None:
        experts = [name for name in there if "w1_EFD" in name and ".step" not in name]
        assert len(experts) == 2 * 8 * 3  # layers, experts; weight and two moments
        assert len(set(there.values())) > 100
        assert there == here

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["ep4", "pp2-ep2"])
    def test_and_trains_on(self, folder: Path, straight: dict[str, Any], name: str) -> None:
        saved = _only_step_2(folder, f"moved-saved-{name}")
        ranks, mesh = OTHERS[name]
        argv = _argv(folder, f"moved-{name}", *mesh, "--training.steps=4", checkpoints=saved)
        moved = run_ranks(train, ranks, argv, timeout_s=TIMEOUT_S)[0]["records"]
        expected = [record["loss"] for record in straight["records"][2:]]
        assert [record["loss"] for record in moved] == pytest.approx(expected, rel=1e-6)


class Job:
    """run_train.sh on 4 ranks of the debug model, in the background; USR1 makes a rank raise."""

    RAISE = """
import os, signal
def stop(*_):
    raise OSError("the data went away")
if "RANK" in os.environ:
    signal.signal(signal.SIGUSR1, stop)
"""

    def __init__(self, folder: Path, *arguments: str) -> None:
        (folder / "sitecustomize.py").write_text(self.RAISE)
        self.run, self.output = folder / "run", folder / "output"
        self.metadata = self.run / "checkpoint" / "step-2" / ".metadata"
        environment = os.environ | {"PYTHONPATH": str(folder), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        options = ("--training.steps=8", "--training.seq_len=31", "--training.local_batch_size=1")
        saving = ("--checkpoint.enable", "--checkpoint.interval=2")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                ["bash", ROOT / "run_train.sh", f"--dump_folder={self.run}", *options, *saving, *arguments],
                env=environment | {"NGPU": "4"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def ranks(self) -> dict[int, int]:
        """Process ids, by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    environment = (process / "environ").read_text().split("\0")
                    (rank,) = [line[5:] for line in environment if line.startswith("RANK=")]
                    found[int(rank)] = int(process.name)
            except (OSError, ValueError):
                continue  # gone meanwhile, or no rank
        return found

    def wait_until(self, what: Callable[[], object]) -> None:
        """Polls while the job runs."""
        deadline = time.monotonic() + TIMEOUT_S
        while not what():
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def ends(self, *, within_s: float) -> tuple[int, list[str]]:
        """Exit status, and what was printed, by line."""
        status = self.process.wait(timeout=within_s)
        return status, self.output.read_text().splitlines()

    def kill(self) -> None:
        """Leaves nothing behind, whatever went wrong."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


# (the rank, what it gets, what another one gets, the last words)
ENDS = {
    "killed": (2, signal.SIGKILL, None, "was killed by signal 9 (SIGKILL)"),
    "rank 0 killed": (0, signal.SIGKILL, None, "was killed by signal 9 (SIGKILL)"),
    "raised": (3, signal.SIGUSR1, None, "failed: OSError: the data went away"),
    # Deaf to SIGTERM, as a rank that hangs in a driver: torchrun waits 30 s for it.
    "killed, and another hangs": (1, signal.SIGKILL, signal.SIGSTOP, "was killed by signal 9 (SIGKILL)"),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for the ranks in /proc")
class TestJob:
    @pytest.mark.parametrize("end", ENDS)
    def test_a_rank_ends_then_the_job_then_the_next_goes_on(self, tmp_path: Path, end: str) -> None:
        """Within 60 s, with rank and cause in the last line; no step is lost or twice in metrics.jsonl."""
        rank, own, other, says = ENDS[end]
        job = Job(tmp_path)
        try:
            job.wait_until(job.metadata.exists)
            ranks = job.ranks()
            assert sorted(ranks) == [0, 1, 2, 3]
            if other is not None:
                os.kill(ranks[3], other)
            os.kill(ranks[rank], own)
            start = time.monotonic()
            status, lines = job.ends(within_s=60)
            print(f"{end}: ended after {time.monotonic() - start:.1f} s: {lines[-1]}")
            assert status == 1
            assert lines[-1].startswith(f"titan_moe: rank {rank} on ")
            assert f" {says} (its log: {tmp_path}" in lines[-1]
            assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
        finally:
            job.kill()

        saved = max(complete(job.run / "checkpoint"))
        assert saved < 8
        again = Job(tmp_path)
        try:
            status, lines = again.ends(within_s=TIMEOUT_S)
        finally:
            again.kill()
        assert status == 0
        assert any(line.endswith(f"Training starts at step {saved + 1}") for line in lines)
        records = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, 9))
        assert (job.run / "checkpoint" / "step-8" / ".metadata").exists()

    def test_a_damaged_shard_is_the_last_line(
        self, folder: Path, straight: dict[str, Any], tmp_path: Path
    ) -> None:
        assert len(straight["records"]) == 4
        saved = _only_step_2(folder, "job-saved")
        file = max((saved / "step-2").glob("*.distcp"), key=lambda f: f.stat().st_size)
        _halve(file)
        job = Job(tmp_path, f"--checkpoint.folder={saved}")
        try:
            status, lines = job.ends(within_s=TIMEOUT_S)
        finally:
            job.kill()
        assert status == 1
        assert re.search(
            rf"^titan_moe: rank \d on \S+ failed: CheckpointError: {file}: truncated, \d+ of \d+ bytes; load "
            r"another with checkpoint.load_step, or restore the file \(its log: ",
            lines[-1],
        )


def _saved(folder: Path, **steps: str) -> Path:
    """``step_4="hf"``: a folder that looks like a finished save in that format."""
    for name, formats in steps.items():
        step = folder / name.replace("_", "-")
        step.mkdir(parents=True)
        for kind in formats.split():
            (step / {"dcp": ".metadata", "hf": "model.safetensors.index.json"}[kind]).touch()
    return folder


class TestLastStepInHuggingFace:
    IN_HF = (
        "--checkpoint.last_save_in_hf",
        "--checkpoint.last_save_model_only",
        "--model.norm_eps=1e-6",
        "--moe.load_balance_coeff=none",
    )

    def _manager(self, folder: Path) -> Any:
        manager: Any = object.__new__(CheckpointManager)
        manager.folder, manager.verify, manager.enable = str(folder), True, True
        manager._close = lambda: None
        return manager

    def test_what_is_continued_from(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        find = lambda folder: self._manager(folder)._find_load_step()  # noqa: E731
        both = _saved(tmp_path / "both", step_2="dcp", step_4="hf")
        assert find(both) == 2
        assert caplog.messages == [
            f"{both / 'step-4'} has weights only (Hugging Face); continuing from step 2"
        ]
        # A run that went on: over the same step, and past it.
        assert find(_saved(tmp_path / "over", step_2="dcp", step_4="hf dcp")) == 4
        assert find(_saved(tmp_path / "past", step_2="dcp", step_4="hf", step_6="dcp")) == 6
        assert len(caplog.messages) == 1

        alone = _saved(tmp_path / "alone", step_4="hf")
        with pytest.raises(CheckpointError) as refused:
            find(alone)
        assert str(refused.value) == (
            f"{alone / 'step-4'} has weights only (Hugging Face), and no other checkpoint is there; start "
            "from it with another dump_folder, checkpoint.initial_load_in_hf = true and "
            f"checkpoint.initial_load_path = '{alone / 'step-4'}'"
        )

    def test_what_is_asked_for_is_refused(self, tmp_path: Path) -> None:
        folder = _saved(tmp_path, step_2="dcp", step_4="hf")
        load = lambda run: self._manager(run).dcp_load({}, str(folder / "step-4"), False, False)  # noqa: E731
        with pytest.raises(CheckpointError, match=r"step-4 has .*; continue from another .*load_step = 2$"):
            load(folder)
        with pytest.raises(
            CheckpointError, match=r"step-4 has .*; set checkpoint.initial_load_in_hf = true$"
        ):
            load(tmp_path / "another-run")

    @pytest.mark.slow
    def test_the_end_of_a_run_and_its_continuation(self, tmp_path: Path) -> None:
        """The same command again does nothing; with more steps it goes on from the step before."""

        def run(steps: int) -> list[dict[str, Any]]:
            options = (*self.IN_HF, f"--training.steps={steps}", "--training.local_batch_size=8")
            argv = _argv(tmp_path, "run", *options, checkpoints=tmp_path / "saved")
            return run_ranks(finish, 1, argv, timeout_s=TIMEOUT_S)[0]

        first = run(4)
        assert [record["step"] for record in first] == [1, 2, 3, 4]
        assert (complete(tmp_path / "saved"), exported(tmp_path / "saved")) == ([2], [4])
        assert (tmp_path / "saved" / "step-4" / "config.json").exists()
        assert run(4) == first
        longer = run(6)
        assert [record["step"] for record in longer] == [1, 2, 3, 4, 5, 6]
        assert longer[:2] == first[:2]
        assert longer[2] != first[2], "done again"
        assert (complete(tmp_path / "saved"), exported(tmp_path / "saved")) == ([2, 4], [6])


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


@pytest.mark.parametrize(("path", "keeps"), [("", True), ("/weights", True), ("/weights", False)])
def test_a_default_that_nobody_set_is_no_warning(
    path: str, keeps: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: torchtitan's own config warns, and ours keeps the value."""
    chosen = {"enable": True, "initial_load_path": path or None, "initial_load_model_only": keeps}
    logger.addHandler(caplog.handler)
    try:
        config = CheckpointManager.Config(**chosen)
        assert "has no effect" not in caplog.text
        upstream.CheckpointManager.Config(**chosen)
        assert ("has no effect" in caplog.text) == (keeps and not path)
    finally:
        logger.removeHandler(caplog.handler)
    assert config.initial_load_model_only == keeps
