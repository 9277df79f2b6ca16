"""The numerics tool on the trainer: planted faults are found and their place is named, healthy pairs pass."""

import dataclasses
import json
import re
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
from titan_moe.layer import router
from titan_moe.layer.border import TokenBorder
from titan_moe.layer.layout import TokenLayout
from titan_moe.layer.moe import MoE
from titan_moe.numerics import runs
from titan_moe.numerics.__main__ import main
from titan_moe.numerics.compare import Comparison, born_inside, compare
from titan_moe.numerics.load import Captured, CaptureError

CONFIGS = Path(__file__).parent.parent / "train_configs"
TIMEOUT_S = 240.0
TP2 = ("--parallelism.tensor_parallel_degree=2",)
TP4 = ("--parallelism.tensor_parallel_degree=4",)
EP2 = ("--parallelism.expert_parallel_degree=2", "--moe.dispatcher=all_to_all")
EP2_TP2 = (*TP2, *EP2)
BF16 = "--training.mixed_precision_param=bfloat16"
SEQ_LEN, BATCH = 32, 8


def _argv(folder: Path, name: str, *overrides: str) -> list[str]:
    return [
        str(CONFIGS / "debug_local.toml"),
        f"--dump_folder={folder / name}",
        "--debug.no-enable_structured_logging",
        "--training.mixed_precision_param=float32",
        f"--training.global_batch_size={BATCH}",
        "--training.steps=1",
        *overrides,
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs live; they start from one seed."""
    return tmp_path_factory.mktemp("numerics")


def _run(
    folder: Path, name: str, ranks: int, *overrides: str, seq_len: int = SEQ_LEN, sabotage: Any = None
) -> Captured:
    """A captured run; the one of that name if it is there already."""
    if not (folder / name).exists():
        replicas = ranks // (2 if TP2[0] in overrides else 4 if TP4[0] in overrides else 1)
        argv = _argv(
            folder,
            name,
            "--numerics.capture",
            f"--training.seq_len={seq_len}",
            f"--training.local_batch_size={BATCH // replicas}",
            *overrides,
        )
        run_ranks(train, ranks, argv, None, sabotage, timeout_s=TIMEOUT_S)
    return Captured(folder / name)


def _against_tp(
    folder: Path, name: str, *mesh: str, seq_len: int = SEQ_LEN, sabotage: Any = None
) -> Comparison:
    """A run on 4 ranks against FSDP2 x TP2."""
    base = _run(folder, f"tp2-{seq_len}", 4, *TP2, seq_len=seq_len)
    return compare(base, _run(folder, name, 4, *mesh, seq_len=seq_len, sabotage=sabotage))


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

    def leave(self, out_TD: Tensor, layout: TokenLayout, like: Tensor) -> Tensor:
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
    dispatcher: Any = moes[0].routed_experts.token_dispatcher
    finish = dispatcher.finish_combine
    dispatcher.finish_combine = lambda *args: finish(*args).bfloat16().float()


class TestPlantedFaults:
    """Each is put into layers.2.moe, or into layers.1.moe, from outside."""

    def test_flat_offset(self, folder: Path) -> None:
        """Of each data-parallel rank's 4 x 32 tokens, the first and the last 16 land where they belong."""
        found = _against_tp(folder, "flat-offset", *EP2_TP2, sabotage=_flat_offset)
        assert found.verdict.startswith("different: layers.2.moe at step 1 by ")
        first = "sequence 0 positions 16-31, sequence 1 positions 0-31, sequence 2 positions 0-31"
        assert f"(192 tokens: {first} and 5 more runs)" in found.verdict

    def test_router_gradient(self, folder: Path) -> None:
        found = _against_tp(folder, "unreduced-gate", *TP2, sabotage=_unreduced_gate)
        assert found.first_beyond is None
        assert found.verdict.startswith("different: gradient of layers.1.moe.router.gate.weight by ")
        assert " and " not in found.verdict  # no other parameter

    def test_doubled_expert_gradients(self, folder: Path) -> None:
        found = _against_tp(folder, "doubled", *EP2_TP2, sabotage=_doubled_experts)
        prefix = "layers.2.moe.routed_experts.inner_experts."
        wrong = {name for name, (off, _) in found.gradients.items() if off > 1e-5}
        assert wrong == {f"{prefix}{weight}" for weight in ("w1_EFD", "w2_EDF", "w3_EFD")}
        assert all(found.gradients[name][1] == pytest.approx(2, rel=1e-4) for name in wrong)
        assert found.verdict.startswith(f"different: gradient of {prefix}")
        assert "norm ratio 2;" in f"{found.verdict};"

    @pytest.mark.slow
    def test_a_dropped_tail_token(self, folder: Path) -> None:
        found = _against_tp(folder, "dropped", *EP2_TP2, seq_len=31, sabotage=_dropped_tail)
        assert found.verdict.startswith("different: layers.2.moe at step 1 by ")
        tails = ", ".join(f"sequence {sequence} position 30" for sequence in range(3))
        assert f"(8 tokens: {tails} and 5 more runs)" in found.verdict

    def test_swapped_experts(self, folder: Path) -> None:
        found = _against_tp(folder, "swapped", *EP2_TP2, sabotage=_swapped_experts)
        assert found.verdict.startswith("different: layers.2.moe at step 1 by ")

    def test_bf16_accumulation(self, folder: Path) -> None:
        """Small, but not small enough; and the modules below inherit it."""
        found = _against_tp(folder, "bf16", *EP2_TP2, sabotage=_bf16_combine)
        place = found.first_beyond
        assert place is not None
        assert place.module == "layers.1.moe"
        assert 1e-4 < place.relative < 1e-2
        assert _outputs(found)["layers.2.attention"].relative > 1e-6

    def test_where_it_is_born(self, folder: Path) -> None:
        """Fed with the baseline's inputs, the modules below the same fault inherit nothing."""
        base = _run(folder, f"tp2-{SEQ_LEN}", 4, *TP2)
        fed = (*EP2_TP2, f"--numerics.inputs_of={base.folder}")
        born = born_inside(base, _run(folder, "bf16-fed", 4, *fed, sabotage=_bf16_combine))
        off = {m.module: m.relative for m in born.sublayers}
        attention = [f"layers.{layer}.attention" for layer in range(3)]
        assert off.keys() == {*attention, "layers.0.feed_forward", "layers.1.moe", "layers.2.moe"}
        assert [off[name] for name in attention] == [0, 0, 0]  # the same TP: the same bits
        assert 1e-4 < off["layers.1.moe"] < 1e-2
        assert 0 < off["layers.2.moe"] < 1e-6
        assert born.share_of_moe == 1
        assert born.flipped == 0


def _outputs(found: Comparison) -> dict[str, Any]:
    return {m.module: m for m in found.modules}


HEALTHY: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "ep2-tp2": (4, SEQ_LEN, EP2_TP2),
    "ep2-tp2-31": (4, 31, EP2_TP2),
    "deepep": (4, SEQ_LEN, (*EP2_TP2, "--moe.dispatcher=deepep")),
    "selective-ac": (4, SEQ_LEN, (*EP2_TP2, "--activation_checkpoint.mode=selective")),
    "full-ac": (4, SEQ_LEN, (*EP2_TP2, "--activation_checkpoint.mode=full")),
    "ep4": (4, SEQ_LEN, ("--parallelism.expert_parallel_degree=4", "--moe.dispatcher=all_to_all")),
    "no-sp": (4, SEQ_LEN, (*EP2_TP2, "--parallelism.no-enable-sequence-parallel")),
    "one-rank": (1, SEQ_LEN, ()),
    "hsdp": (4, SEQ_LEN, (*EP2, "--parallelism.data_parallel_replicate_degree=2")),
    "tp4-ep4": (4, SEQ_LEN, (*TP4, "--parallelism.expert_parallel_degree=4", "--moe.dispatcher=all_to_all")),
}


SLOW = ("deepep", "selective-ac", "full-ac", "ep4", "no-sp", "ep2-tp2-31", "hsdp", "tp4-ep4")


class TestHealthyPairs:
    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in HEALTHY]
    )
    def test_are_within_tolerance(self, folder: Path, name: str) -> None:
        ranks, seq_len, mesh = HEALTHY[name]
        base = _run(folder, f"tp2-{seq_len}", 4, *TP2, seq_len=seq_len)
        found = compare(base, _run(folder, name, ranks, *mesh, seq_len=seq_len))
        assert found.problems == []
        assert found.verdict.startswith("within float32 tolerance over 1 step: ")
        assert len(found.gradients) > 30
        names = {m.module for m in found.modules}
        assert {"layers.1.moe", "layers.2.attention", "layers.2", "norm"} <= names
        assert {f.layer for f in found.flips} == {"layers.1.moe.router", "layers.2.moe.router"}

    def test_equal_bits(self, folder: Path) -> None:
        """all_to_all and deepep with all rows back."""
        per_slot = (*EP2_TP2, "--moe.dispatcher=deepep", "--moe.deepep.combine=per_slot")
        first = _run(folder, "bits-1", 4, *EP2_TP2, BF16)
        second = _run(folder, "bits-2", 4, *per_slot, BF16)
        found = compare(first, second)
        assert found.bitwise, found.verdict
        assert found.verdict == "bitwise equal over 1 step"
        assert not compare(first, _run(folder, "ep2-tp2", 4, *EP2_TP2)).bitwise

    def test_stock(self, folder: Path) -> None:
        """torchtitan's own layer in our place: other rounding, and nothing else."""
        stock = _run(folder, "stock", 4, *EP2_TP2, "--model.moe=torchtitan", BF16)
        found = compare(_run(folder, "bits-1", 4, *EP2_TP2, BF16), stock)
        assert found.first_beyond is None
        assert 0 < found.worst_loss < 1e-4
        assert len(found.gradients) > 30
        assert all(off < 0.2 for off, _ in found.gradients.values())  # 256 tokens, of which a few flip
        assert {f.layer for f in found.flips} == {"layers.1.moe.router", "layers.2.moe.router"}
        assert 0 < _outputs(found)["layers.1.moe"].relative < 1e-2
        first, *_ = stock.records
        assert (first["load"], first["traffic"]) == ({}, {})


DEBUG = str(CONFIGS / "debug_local.toml")
SMALL = ("--training.mixed_precision_param=float32", "--training.seq_len=16", "--training.local_batch_size=2")


def _in_workers(self: runs.Runs, name: str, side: runs.Side) -> Path:
    self.progress(f"{name}: {side.ranks} ranks")
    folder, steps = self.folder / name, f"--training.steps={self.steps}"
    argv = [str(side.config), f"--dump_folder={folder}", steps, "--metrics.log_freq=1", *side.overrides]
    run_ranks(train, side.ranks, argv, timeout_s=TIMEOUT_S)
    return folder


class TestCommand:
    def _compare(self, *argv: str) -> int:
        return main(["compare", *argv])

    def test_two_folders(self, folder: Path, tmp_path: Path, capsys: Any) -> None:
        base, good = _run(folder, f"tp2-{SEQ_LEN}", 4, *TP2), _run(folder, "ep2-tp2", 4, *EP2_TP2)
        assert self._compare(str(base.folder), str(good.folder), "--out", str(tmp_path)) == 0
        assert "verdict: within float32 tolerance" in capsys.readouterr().out
        bad = _run(folder, "flat-offset", 4, *EP2_TP2, sabotage=_flat_offset)
        assert self._compare(str(base.folder), str(bad.folder), "--out", str(tmp_path)) == 1
        said = capsys.readouterr().out
        assert "verdict: different: " in said
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["free"]["problems"]
        page = (tmp_path / "report.html").read_text()
        assert page.count("<svg") == 6  # without runs of its own the command cannot tell where it is born
        assert "layers.2.moe" in page
        assert "http" not in page.replace("http://www.w3.org/2000/svg", "")

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

    def test_runs_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        """Baseline, candidate, fed, replayed: in this session's workers instead of under torchrun."""
        monkeypatch.setattr(runs.Runs, "_run", _in_workers)
        ep2 = f"{DEBUG}@2 {' '.join(EP2)}"
        options = ("--steps", "2", "--replay-routing", "--out", str(tmp_path), "--", *SMALL)
        assert self._compare(f"{DEBUG}@2", ep2, *options) == 0
        captured = capsys.readouterr()
        stages = [line.split("s  ")[1] for line in captured.err.splitlines()]
        assert stages == ["baseline", "candidate", "fed", "replayed"]
        report = json.loads((tmp_path / "report.json").read_text())
        assert report.keys() == {"about", "free", "replayed", "routing", "born"}
        assert "step        baseline       candidate  difference    numerics     routing" in captured.out
        assert "on the baseline's routes: within float32 tolerance over 2 steps" in captured.out
        assert "at equal inputs: " in captured.out
        assert [step for step, *_ in report["free"]["losses"]] == [1, 2]
        assert [flips["flipped"] for flips in report["replayed"]["flips"]] == [0, 0, 0, 0]
        assert (tmp_path / "report.html").read_text().count("<svg") == 7

    def test_a_run_that_fails(self, tmp_path: Path, capsys: Any) -> None:
        """Its own last words are passed on."""
        wrong = ("--", "--training.stepz=3")
        assert self._compare(DEBUG, DEBUG, "--out", str(tmp_path), *wrong) == 2
        said = capsys.readouterr().err
        assert re.search(
            r"titan_moe: baseline failed with status .*training.stepz .* \(log: .*log.txt\)$", said
        )

    @pytest.mark.slow
    def test_other_data(self, folder: Path) -> None:
        base = _run(folder, f"tp2-{SEQ_LEN}", 4, *TP2)
        with pytest.raises(CaptureError, match=r"8 sequences of 32 tokens a step, .* 8 of 31: other data"):
            compare(base, _run(folder, "tp2-31", 4, *TP2, seq_len=31))

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            ("/nope.toml", "/nope.toml: no such file"),
            ("x.toml@many", "x.toml@many: the number of ranks (many) must be a positive integer"),
            ("x.toml@0", "x.toml@0: the number of ranks (0) must be a positive integer"),
            (f"{DEBUG} --stock --replay-routing", "--replay-routing with --stock: torchtitan's router"),
        ],
    )
    def test_wrong_calls(self, base: str, words: str, tmp_path: Path, capsys: Any) -> None:
        file, *options = base.split()
        assert self._compare(file, file, *options, "--out", str(tmp_path)) == 2
        assert words in capsys.readouterr().err

    def test_a_folder_and_a_configuration(self, tmp_path: Path, capsys: Any) -> None:
        assert self._compare(str(tmp_path), DEBUG) == 2
        assert self._compare(str(tmp_path), str(tmp_path), "--steps", "3") == 2
        said = capsys.readouterr().err
        assert "a dump folder and a configuration: give two of one kind" in said
        assert "--steps and overrides make runs; these are dump folders" in said

    def test_what_out_may_be(self, tmp_path: Path, capsys: Any) -> None:
        """A new folder, or one of our own, which is emptied; and a typo deletes nothing."""
        runs.claim(tmp_path / "new")
        (tmp_path / "new" / "report.html").write_text("of an earlier call")
        assert self._compare("/nope.toml", DEBUG, "--out", str(tmp_path / "new")) == 2
        assert (tmp_path / "new" / "report.html").exists()
        runs.claim(tmp_path / "new")
        assert [file.name for file in (tmp_path / "new").iterdir()] == [".numerics"]
        assert self._compare(DEBUG, DEBUG, "--out", str(tmp_path)) == 2
        assert "not empty, and not from an earlier call; give a new folder" in capsys.readouterr().err
        assert (tmp_path / "new" / ".numerics").exists()

    @pytest.mark.parametrize("text", ["7-5", "0", "99", "a", ""])
    def test_lines_that_are_not_there(self, text: str) -> None:
        with pytest.raises(SystemExit):
            main(["table", "--lines", text])

    def test_folders_without_a_capture(self, tmp_path: Path, capsys: Any) -> None:
        assert self._compare(str(tmp_path), str(tmp_path)) == 2
        assert "manifest.json: missing; run with --numerics.capture" in capsys.readouterr().err

    @pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"abc")])
    def test_a_damaged_capture(self, folder: Path, tmp_path: Path, damage: Callable[[Path], Any]) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(_run(folder, "ep2-tp2", 4, *EP2_TP2).folder, copy)
        damage(next((copy / "numerics").glob("step-*rank-0002*")))
        with pytest.raises(CaptureError, match=r"rank-0002\.safetensors: (missing|truncated)"):
            compare(Captured(copy), Captured(copy))
