"""The numerics tool on the trainer: planted faults are found and their place is named, healthy pairs pass."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.faults import FAULTS
from tests.ranks import run_ranks
from tests.training import train
from titan_moe import router
from titan_moe.border import TokenBorder
from titan_moe.dispatch.base import DispatchMetadata
from titan_moe.moe import MoE
from titan_moe.numerics.__main__ import main
from titan_moe.numerics.compare import Comparison, Tolerance, compare
from titan_moe.numerics.load import Captured, CaptureError

CONFIGS = Path(__file__).parent.parent / "train_configs"
TIMEOUT_S = 240.0
TP2 = ("--parallelism.tensor_parallel_degree=2",)
EP2_TP2 = (*TP2, "--parallelism.expert_parallel_degree=2", "--moe.dispatcher=all_to_all")
SEQ_LEN, BATCH = 32, 8


def _argv(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        str(CONFIGS / "debug_local.toml"),
        f"--dump_folder={folder / name}",
        "--debug.no-enable_structured_logging",
        "--training.mixed_precision_param=float32",
        f"--training.global_batch_size={BATCH}",
        "--training.steps=1",
        "--checkpoint.enable",
        "--checkpoint.interval=1000",
        *overrides,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs live; they start from the checkpoint in ``seed``."""
    folder = tmp_path_factory.mktemp("numerics")
    batch = f"--training.local_batch_size={BATCH}"
    argv = _argv(folder, "seed", batch, "--checkpoint.create_seed_checkpoint", "--checkpoint.folder=.")
    run_ranks(train, 1, argv, timeout_s=TIMEOUT_S)
    return folder


def _run(
    folder: Path, name: str, ranks: int, *overrides: str, seq_len: int = SEQ_LEN, sabotage: Any = None
) -> Captured:
    """A captured run; the one of that name if it is there already."""
    if not (folder / name).exists():
        replicas = ranks // (2 if TP2[0] in overrides else 1)
        argv = _argv(
            folder,
            name,
            "--numerics.capture",
            f"--checkpoint.initial_load_path={folder / 'seed' / 'step-0'}",
            f"--training.seq_len={seq_len}",
            f"--training.local_batch_size={BATCH // replicas}",
            *(['--checkpoint.exclude_from_loading=["dataloader"]'] if seq_len != 128 else []),
            *overrides,
        )
        run_ranks(train, ranks, argv, None, sabotage, timeout_s=TIMEOUT_S)
    return Captured(folder / name)


def _against_tp(
    folder: Path, name: str, *mesh: str, seq_len: int = SEQ_LEN, sabotage: Any = None
) -> Comparison:
    """A run on 4 ranks against FSDP2 x TP2."""
    base = _run(folder, f"tp2-{seq_len}", 4, *TP2, seq_len=seq_len)
    return compare(base, _run(folder, name, 4, *mesh, seq_len=seq_len, sabotage=sabotage), Tolerance())


def _flat_offset(moes: list[MoE]) -> None:
    FAULTS["flat_offset"](moes[1])


def _as_if_whole(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _unreduced_gate(moes: list[MoE]) -> None:
    """pytorch/torchtitan#2387, on a gate that FSDP shards as well."""
    scores = moes[0].router._scores

    def unreduced(x_TD: Tensor) -> Tensor:
        with mock.patch.object(router, "_local_gate", _as_if_whole):
            return scores(x_TD)

    moes[0].router._scores = unreduced  # type: ignore[method-assign]


def _doubled_experts(moes: list[MoE]) -> None:
    """As if EP counted the experts' gradients twice."""
    experts: Any = moes[1].routed_experts.inner_experts
    grouped_mm = experts._grouped_mm

    def doubled(*, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(A=A, B_t=_DoubledGradient.apply(B_t), offs=offs)

    experts._grouped_mm = doubled


class _DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DroppedTail(TokenBorder):
    """The last position of each sequence gets nothing from the routed experts."""

    def leave(self, out_TD: Tensor, layout: DispatchMetadata, like: Tensor) -> Tensor:
        positions_T = layout.global_token_indices() % layout.global_seq_len
        kept_T = positions_T != layout.global_seq_len - 1
        return super().leave(out_TD * kept_T.unsqueeze(1), layout, like)


def _dropped_tail(moes: list[MoE]) -> None:
    moes[1].border = _DroppedTail(**vars(moes[1].border))


def _swapped_experts(moes: list[MoE]) -> None:
    """Rows of the first two local experts exchanged."""
    experts: Any = moes[1].routed_experts.inner_experts
    grouped_mm = experts._grouped_mm

    def swapped(*, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        order = [1, 0, *range(2, B_t.shape[0])]
        return grouped_mm(A=A, B_t=B_t[order].transpose(-2, -1).contiguous().transpose(-2, -1), offs=offs)

    experts._grouped_mm = swapped


def _bf16_combine(moes: list[MoE]) -> None:
    dispatcher: Any = moes[1].routed_experts.token_dispatcher
    finish = dispatcher.finish_combine
    dispatcher.finish_combine = lambda *args: finish(*args).bfloat16().float()


class TestPlantedFaults:
    """Each is put into layers.2.moe, or into layers.1.moe's router, from outside."""

    def test_flat_offset(self, folder: Path) -> None:
        found = _against_tp(folder, "flat-offset", *EP2_TP2, sabotage=_flat_offset)
        place = found.first_module
        assert place is not None
        assert (place.step, place.module) == (1, "layers.2.moe")
        assert "different: " in found.verdict
        assert "layers.2.moe at step 1, token " in found.verdict

    def test_router_gradient(self, folder: Path) -> None:
        found = _against_tp(folder, "unreduced-gate", *TP2, sabotage=_unreduced_gate)
        assert found.first_module is None or "(gradient)" in found.first_module.module
        wrong = {name for name, (off, _) in found.gradients.items() if off > 1e-2}
        assert "layers.1.moe.router.gate.weight" in wrong
        assert "gradient of " in found.verdict

    def test_doubled_expert_gradients(self, folder: Path) -> None:
        found = _against_tp(folder, "doubled", *EP2_TP2, sabotage=_doubled_experts)
        prefix = "layers.2.moe.routed_experts.inner_experts."
        wrong = {name for name, (off, _) in found.gradients.items() if off > 1e-5}
        assert wrong == {f"{prefix}{weight}" for weight in ("w1_EFD", "w2_EDF", "w3_EFD")}
        assert all(found.gradients[name][1] == pytest.approx(2, rel=1e-4) for name in wrong)
        assert f"gradient of {prefix}" in found.verdict

    def test_a_dropped_tail_token(self, folder: Path) -> None:
        found = _against_tp(folder, "dropped", *EP2_TP2, seq_len=31, sabotage=_dropped_tail)
        place = found.first_module
        assert place is not None
        assert (place.step, place.module) == (1, "layers.2.moe")
        assert place.worst_token % 31 == 30

    def test_swapped_experts(self, folder: Path) -> None:
        found = _against_tp(folder, "swapped", *EP2_TP2, sabotage=_swapped_experts)
        assert found.first_module is not None
        assert found.first_module.module == "layers.2.moe"

    def test_bf16_accumulation(self, folder: Path) -> None:
        found = _against_tp(folder, "bf16", *EP2_TP2, sabotage=_bf16_combine)
        place = found.first_module
        assert place is not None
        assert place.module == "layers.2.moe"
        assert 1e-4 < place.relative < 1e-2


HEALTHY: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "ep2-tp2": (4, SEQ_LEN, EP2_TP2),
    "ep2-tp2-31": (4, 31, EP2_TP2),
    "deepep": (4, SEQ_LEN, (*EP2_TP2, "--moe.dispatcher=deepep")),
    "selective-ac": (4, SEQ_LEN, (*EP2_TP2, "--activation_checkpoint.mode=selective")),
    "full-ac": (4, SEQ_LEN, (*EP2_TP2, "--activation_checkpoint.mode=full")),
    "ep4": (4, SEQ_LEN, ("--parallelism.expert_parallel_degree=4", "--moe.dispatcher=all_to_all")),
    "no-sp": (4, SEQ_LEN, (*EP2_TP2, "--parallelism.no-enable-sequence-parallel")),
    "one-rank": (1, SEQ_LEN, ()),
}


SLOW = ("selective-ac", "full-ac", "ep4", "no-sp", "ep2-tp2-31")


class TestHealthyPairs:
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in HEALTHY]
    )
    def test_are_within_tolerance(self, folder: Path, name: str) -> None:
        ranks, seq_len, mesh = HEALTHY[name]
        base = _run(folder, f"tp2-{seq_len}", 4, *TP2, seq_len=seq_len)
        found = compare(base, _run(folder, name, ranks, *mesh, seq_len=seq_len), Tolerance())
        assert found.problems == []
        assert found.verdict.startswith("within tolerance over 1 steps")
        assert len(found.gradients) > 30
        names = {m.module for m in found.modules}
        assert {"layers.1.moe", "layers.2.attention", "layers.2", "norm"} <= names
        assert {f.layer for f in found.flips} == {"layers.1.moe.router", "layers.2.moe.router"}

    def test_equal_bits(self, folder: Path) -> None:
        """all_to_all and deepep with all rows back."""
        per_slot = (*EP2_TP2, "--moe.dispatcher=deepep", "--moe.deepep.combine=per_slot")
        bf16 = "--training.mixed_precision_param=bfloat16"
        first = _run(folder, "bits-1", 4, *EP2_TP2, bf16)
        second = _run(folder, "bits-2", 4, *per_slot, bf16)
        found = compare(first, second, Tolerance())
        assert found.bitwise, found.verdict
        assert found.verdict == "bitwise equal over 1 steps"
        assert not compare(first, _run(folder, "ep2-tp2", 4, *EP2_TP2), Tolerance()).bitwise


class TestCommand:
    def _compare(self, *argv: str) -> int:
        return main(["compare", *argv])

    def test_two_folders(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        base, good = _run(folder, f"tp2-{SEQ_LEN}", 4, *TP2), _run(folder, "ep2-tp2", 4, *EP2_TP2)
        assert self._compare(str(base.folder), str(good.folder), "--out", str(tmp_path)) == 0
        assert "verdict: within tolerance" in capsys.readouterr().out
        bad = _run(folder, "flat-offset", 4, *EP2_TP2, sabotage=_flat_offset)
        assert self._compare(str(base.folder), str(bad.folder), "--out", str(tmp_path)) == 1
        said = capsys.readouterr().out
        assert "verdict: different: " in said
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["free"]["problems"]
        page = (tmp_path / "report.html").read_text()
        assert page.count("<svg") == 6
        assert "layers.2.moe" in page
        assert "http" not in page.replace("http-equiv", "")

    def test_the_page_in_a_browser(self, folder: Path, tmp_path: Path) -> None:
        """Debian's chromium, headless: all plots are there, and nothing is complained about."""
        browser = shutil.which("chromium")
        if browser is None:
            pytest.skip("no chromium (Debian's package of that name)")
        base, good = _run(folder, f"tp2-{SEQ_LEN}", 4, *TP2), _run(folder, "ep2-tp2", 4, *EP2_TP2)
        assert self._compare(str(base.folder), str(good.folder), "--out", str(tmp_path)) == 0
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--window-size=1366,900",
        )
        command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        page = subprocess.run(
            [*command, (tmp_path / "report.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert page.stdout.count("<svg") == 6
        assert "nothing to draw" not in page.stdout
        assert "CONSOLE" not in page.stderr

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            ("/nope.toml", "/nope.toml: no such file"),
            ("x.toml@many", "number of ranks after @ must be a positive"),
        ],
    )
    def test_wrong_calls(self, base: str, words: str, tmp_path: Path, capsys: Any) -> None:
        assert self._compare(base, base, "--out", str(tmp_path)) == 2
        assert words in capsys.readouterr().err

    def test_folders_without_a_capture(self, tmp_path: Path, capsys: Any) -> None:
        assert self._compare(str(tmp_path), str(tmp_path)) == 2
        assert "metrics.jsonl" in capsys.readouterr().err

    @pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"abc")])
    def test_a_damaged_capture(self, folder: Path, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(_run(folder, "ep2-tp2", 4, *EP2_TP2).folder, copy)
        damage(next((copy / "numerics").glob("step-*rank-0002*")))
        with pytest.raises(CaptureError, match=r"rank-0002\.safetensors: (missing|truncated)"):
            compare(Captured(copy), Captured(copy), Tolerance())
