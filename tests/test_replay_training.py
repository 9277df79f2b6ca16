"""Traces through the trainer: recorded on one mesh, replayed on others, and refused when they do not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import RankError, run_ranks
from tests.training import train
from titan_moe.layer.moe import MoE
from titan_moe.layer.router import select_live

CONFIGS = Path(__file__).parent.parent / "train_configs"
TIMEOUT_S = 240.0
STEPS, LAYERS, GLOBAL_BATCH = 2, 2, 18
TP2 = ("--parallelism.tensor_parallel_degree=2",)
EP2_TP2 = (*TP2, "--parallelism.expert_parallel_degree=2", "--moe.dispatcher=all_to_all")
DEEPEP = (*EP2_TP2, "--moe.dispatcher=deepep")


def _argv(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        str(CONFIGS / "debug_local.toml"),
        f"--dump_folder={folder / name}",
        "--debug.no-enable_structured_logging",
        "--training.mixed_precision_param=float32",
        "--training.seq_len=127",
        *overrides,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs live; they start from one seed."""
    return tmp_path_factory.mktemp("replay")


def _run(folder: Path, name: str, world_size: int, *overrides: str, sabotage: Any = None) -> list[Any]:
    argv = _argv(folder, name, *overrides)
    return run_ranks(train, world_size, argv, None, sabotage, timeout_s=TIMEOUT_S)


def _losses(results: list[Any]) -> list[float]:
    return [record["loss"] for record in results[0]["records"]]


def _evidence(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "replay_evidence.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recorded(folder: Path) -> list[float]:
    """FSDP2 x TP2, B 3, three microbatches per step; the losses."""
    results = _run(
        folder,
        "recorded",
        4,
        *TP2,
        f"--training.steps={STEPS}",
        "--training.local_batch_size=3",
        f"--training.global_batch_size={GLOBAL_BATCH}",
        "--routing_replay.mode=record",
        f"--routing_replay.path={folder / 'trace'}",
    )
    return _losses(results)


# name: ranks, local batch (and with it the microbatches of a step), AC, mesh
REPLAYS: dict[str, tuple[int, int, str, tuple[str, ...]]] = {
    "ep2-tp2": (4, 3, "none", EP2_TP2),
    "deepep": (4, 3, "full", DEEPEP),
    "ep4": (4, 9, "selective", (*TP2, "--parallelism.expert_parallel_degree=4", EP2_TP2[-1])),
    "one-rank": (1, 6, "full", ()),
    "tp2": (4, 3, "selective", TP2),
}
SLOW = ("tp2", "ep4", "deepep", "one-rank")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in REPLAYS],
)
def test_a_trace_replays_on_another_mesh(folder: Path, recorded: list[float], name: str) -> None:
    ranks, batch, ac, mesh = REPLAYS[name]
    results = _run(
        folder,
        name,
        ranks,
        *mesh,
        f"--training.steps={STEPS}",
        f"--training.local_batch_size={batch}",
        f"--training.global_batch_size={GLOBAL_BATCH}",
        f"--activation_checkpoint.mode={ac}",
        "--routing_replay.mode=replay",
        "--routing_replay.check",
        f"--routing_replay.path={folder / 'trace'}",
    )
    assert _losses(results) == pytest.approx(recorded, rel=1e-6)
    lines = _evidence(folder, name)
    assert len(lines) == STEPS * LAYERS * ranks
    microbatches = GLOBAL_BATCH // (batch * max(1, ranks // 2))
    for line in lines:
        assert line["fwd"] == line["bwd"] == microbatches
        assert line["recomputed"] == (0 if ac == "none" else microbatches)
        assert (line["used"], line["filled"], line["miscounted"]) == (1.0, 0, 0)
        assert line["mean_overlap"] > 0.999, "the same weights route the same way"
    assert {line["layer"] for line in lines} == {"layers.1.moe", "layers.2.moe"}


@pytest.mark.slow
def test_recording_changes_nothing(folder: Path, recorded: list[float]) -> None:
    results = _run(
        folder,
        "plain",
        4,
        *TP2,
        f"--training.steps={STEPS}",
        "--training.local_batch_size=3",
        f"--training.global_batch_size={GLOBAL_BATCH}",
    )
    assert _losses(results) == recorded


FRESH_DATA = '--checkpoint.exclude_from_loading=["dataloader"]'
ONE_STEP = ("--training.steps=1", "--training.local_batch_size=6")
REPLAY = ("--routing_replay.mode=replay", "--routing_replay.check")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    """A trace of one step of 6 sequences, on one rank."""
    path = folder / "small"
    _run(folder, "small-run", 1, *ONE_STEP, "--routing_replay.mode=record", f"--routing_replay.path={path}")
    return path


def _replay(folder: Path, trace: Path, *further: str, sabotage: Any = None, name: str = "") -> list[Any]:
    name = name or f"again-{len(list(folder.iterdir()))}"
    argv = (*ONE_STEP, *REPLAY, f"--routing_replay.path={trace}", *further)
    return _run(folder, name, 1, *argv, sabotage=sabotage)


def _shift_tokens(ids: dict[str, torch.Tensor]) -> None:
    for name in _layers(ids):
        ids[name] = ids[name].roll(1, 0)


def _shift_layers(ids: dict[str, torch.Tensor]) -> None:
    first, second = _layers(ids)
    ids[first], ids[second] = ids[second], ids[first]


def _swap_samples(ids: dict[str, torch.Tensor]) -> None:
    for name in _layers(ids):
        samples = ids[name].unflatten(0, (6, 127))
        ids[name] = samples[[1, 0, 2, 3, 4, 5]].flatten(0, 1)


def _layers(ids: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name for name in ids if "#" in name and not name.endswith(".tokens"))


def _edited(small: Path, tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    trace = tmp_path / "edited"
    shutil.copytree(small, trace)
    (file,) = trace.glob("*.safetensors")
    ids = load_file(file)
    edit(ids)
    save_file({name: tensor.contiguous() for name, tensor in ids.items()}, file)
    return trace


class TestTheCheckFails:
    """On routes that are some other token's, and where nothing was replayed."""

    def test_the_unedited_trace_passes(self, folder: Path, small: Path, tmp_path: Path) -> None:
        _replay(folder, _edited(small, tmp_path, lambda ids: None))

    @pytest.mark.parametrize("edit", [_shift_tokens, _shift_layers, _swap_samples])
    def test_other_tokens_routes(self, folder: Path, small: Path, tmp_path: Path, edit: Any) -> None:
        with pytest.raises(RankError, match=r"step 1: layers.* share no expert with the live router"):
            _replay(folder, _edited(small, tmp_path, edit))

    def test_a_router_that_lost_its_slot(self, folder: Path, small: Path) -> None:
        with pytest.raises(RankError, match=r"layers\.2\.moe: replayed in 0 of 1 microbatches \(fwd\)"):
            _replay(folder, small, sabotage=_take_the_slot_out)

    def test_ids_that_change_behind_the_router(self, folder: Path, small: Path) -> None:
        with pytest.raises(RankError, match=r"layers\.1\.moe: \d+ picks at the dispatcher are not the inst"):
            _replay(folder, small, sabotage=_swap_ids_behind_the_router)

    def test_a_run_without_a_step(self, folder: Path, small: Path) -> None:
        _replay(folder, small, "--checkpoint.enable", name="once")
        with pytest.raises(RankError, match=r"routing_replay.check is on, and no step was checked"):
            _replay(folder, small, "--checkpoint.enable", name="once")  # resumes at its own last step

    def test_gates(self, folder: Path, small: Path, tmp_path: Path) -> None:
        trace = _edited(small, tmp_path, _shift_tokens)
        with pytest.raises(RankError, match=r"mean overlap .* is under check_min_mean_overlap \(99.00%\)"):
            _replay(
                folder,
                trace,
                "--routing_replay.check_max_zero_overlap=1.0",
                "--routing_replay.check_min_mean_overlap=0.99",
            )


def _take_the_slot_out(moes: list[MoE]) -> None:
    moes[-1].router.selector = select_live


def _swap_ids_behind_the_router(moes: list[MoE]) -> None:
    """Each token's ids for those of its neighbour."""

    def swapped(_module: Any, _args: Any, routing: Any) -> Any:
        return routing._replace(topk_expert_ids_TK=routing.topk_expert_ids_TK.roll(1, 0))

    moes[0].router.register_forward_hook(swapped)


class TestTracesThatDoNotFit:
    """One line each, before a wrong number."""

    def _refused(self, folder: Path, trace: Path, words: str, *further: str) -> None:
        with pytest.raises(RankError, match=words):
            _replay(folder, trace, *further)

    def test_other_text(self, folder: Path, small: Path) -> None:
        words = r"ReplayDataError: sequence 0 of this step is other text than in the trace"
        self._refused(folder, small, words, "--dataloader.seed=5", FRESH_DATA)

    def test_another_shape(self, folder: Path, small: Path) -> None:
        self._refused(
            folder, small, "recorded with seq_len 127, this run has 64", "--training.seq_len=64", FRESH_DATA
        )

    def test_another_batch(self, folder: Path, small: Path) -> None:
        words = "recorded with sequences_per_step 6, this run has 4"
        self._refused(folder, small, words, "--training.local_batch_size=4")

    def test_more_steps_than_recorded(self, folder: Path, small: Path) -> None:
        self._refused(folder, small, "no step 2; it has 1 to 1", "--training.steps=2")

    def test_other_weights(self, folder: Path, small: Path) -> None:
        trace = folder / "other-weights"
        shutil.copytree(small, trace)
        manifest = json.loads((trace / "manifest.json").read_text())
        (trace / "manifest.json").write_text(json.dumps(manifest | {"weights": "0" * 16}))
        self._refused(folder, trace, r"recorded from other weights \(0+\) than this run starts from")
        _replay(folder, trace, "--routing_replay.no-check_weights")

    @pytest.mark.parametrize("keep", [0, 7, 200])
    def test_a_truncated_file(self, folder: Path, small: Path, tmp_path: Path, keep: int) -> None:
        trace = _edited(small, tmp_path, lambda ids: None)
        (file,) = trace.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:keep])
        self._refused(folder, trace, r"step-000001\.rank-0000\.safetensors: truncated or damaged")

    def test_a_truncated_manifest(self, folder: Path, small: Path, tmp_path: Path) -> None:
        trace = _edited(small, tmp_path, lambda ids: None)
        text = (trace / "manifest.json").read_text()
        (trace / "manifest.json").write_text(text[: len(text) // 2])
        self._refused(folder, trace, r"manifest\.json: truncated or not JSON")

    def test_a_missing_rank(self, folder: Path, small: Path, tmp_path: Path) -> None:
        trace = _edited(small, tmp_path, lambda ids: None)
        next(trace.glob("*.safetensors")).unlink()
        self._refused(folder, trace, "missing; the recording was cut short")

    @pytest.mark.parametrize("change", [{"steps": None}, {"ranks": "1"}, {"layers": []}])
    def test_a_damaged_manifest(self, folder: Path, small: Path, tmp_path: Path, change: Any) -> None:
        trace = _edited(small, tmp_path, lambda ids: None)
        manifest = json.loads((trace / "manifest.json").read_text())
        (trace / "manifest.json").write_text(json.dumps(manifest | change))
        self._refused(folder, trace, r"manifest\.json: damaged: ")

    def test_tokens_of_another_batch(self, folder: Path, small: Path, tmp_path: Path) -> None:
        def shift(ids: dict[str, torch.Tensor]) -> None:
            ids[f"{_layers(ids)[0]}.tokens"] -= 1

        words = r"damaged: layers\.1\.moe#0 holds no ids of tokens 0 to 761"
        self._refused(folder, _edited(small, tmp_path, shift), words)

    def test_a_trace_is_not_written_over(self, folder: Path, small: Path) -> None:
        before = {file.name: file.read_bytes() for file in small.iterdir()}
        argv = (*ONE_STEP, "--routing_replay.mode=record", f"--routing_replay.path={small}")
        with pytest.raises(RankError, match=r"holds a trace of steps \[1\], recorded on 1 ranks"):
            _run(folder, "over", 1, *argv)
        assert {file.name: file.read_bytes() for file in small.iterdir()} == before

    @pytest.mark.slow
    def test_a_resumed_recording_goes_on(self, folder: Path) -> None:
        record = (
            "--checkpoint.enable",
            "--routing_replay.mode=record",
            f"--routing_replay.path={folder / 'resumed-trace'}",
        )
        for steps in (1, 2):
            _run(folder, "resumed", 1, *record, "--training.local_batch_size=6", f"--training.steps={steps}")
        manifest = json.loads((folder / "resumed-trace" / "manifest.json").read_text())
        assert (manifest["steps"], manifest["first_step"]) == ([1, 2], 1)
        _replay(folder, folder / "resumed-trace", "--training.steps=2")

    def test_ids_that_are_missing_are_filled(self, folder: Path, small: Path, tmp_path: Path) -> None:
        def forget(ids: dict[str, torch.Tensor]) -> None:
            for name in _layers(ids):
                ids[name][::5, 1] = -1

        _replay(folder, _edited(small, tmp_path, forget), name="filled")
        lines = _evidence(folder, "filled")
        assert [line["filled"] for line in lines] == [153, 153]
        assert all(line["used"] == line["exact_set"] == 1.0 for line in lines)

    def test_the_same_expert_twice(self, folder: Path, small: Path, tmp_path: Path) -> None:
        def double(ids: dict[str, torch.Tensor]) -> None:
            ids[_layers(ids)[1]][130, 1] = ids[_layers(ids)[1]][130, 0]

        words = r"step 1: layers\.2\.moe, sample 1, token 3: .* has the same id twice"
        self._refused(folder, _edited(small, tmp_path, double), words)

    def test_missing_tokens(self, folder: Path, small: Path, tmp_path: Path) -> None:
        def cut(ids: dict[str, torch.Tensor]) -> None:
            name = _layers(ids)[0]
            ids[name], ids[f"{name}.tokens"] = ids[name][:-2], ids[f"{name}.tokens"][:-2]

        words = r"layers\.1\.moe#0 has no ids for sequence 5, position 125 \(2 tokens lack them\)"
        self._refused(folder, _edited(small, tmp_path, cut), words)
