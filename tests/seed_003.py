"""``python -m tests.seed_003``: the three pictures of pytorch/torchtitan#3604, from runs of ours.

FSDP2 x TP2; FSDP2 x TP2 x EP2 with that bug planted in every MoE layer; the same without. One seed
checkpoint, the default config: 6 sequences of 128 tokens per data-parallel rank, bf16.
"""

import sys
import tempfile
from pathlib import Path

from tests.faults import FAULTS
from tests.ranks import close_pools, run_ranks
from tests.training import train
from titan_moe.moe import MoE
from titan_moe.numerics import svg
from titan_moe.numerics.compare import relative

ROOT = Path(__file__).parent.parent
TP, EP = (str(ROOT / "train_configs" / f"debug_fsdp_{mesh}.toml") for mesh in ("tp", "tp_ep"))
LAYERS = 6  # all of the debug model's
STEPS, TIMEOUT_S = 20, 900.0


def flat_offset(moes: list[MoE]) -> None:
    """The bug, in every layer."""
    for moe in moes:
        FAULTS["flat_offset"](moe)


def losses(folder: Path, config: str, *overrides: str, ranks: int = 4, sabotage: object = None) -> svg.Curve:
    """Of a run in ``folder``, by step."""
    argv = [config, f"--dump_folder={folder}", "--debug.no-enable_structured_logging"]
    argv += [f"--training.steps={STEPS}", "--checkpoint.enable", "--checkpoint.interval=1000", *overrides]
    results = run_ranks(train, ranks, argv, None, sabotage, LAYERS, timeout_s=TIMEOUT_S)
    return [(record["step"], record["loss"]) for record in results[0]["records"]]


def main() -> None:
    """Writes the pictures and says by how much the curves differ."""
    out = ROOT / "docs" / "pictures"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_seed = ("--checkpoint.create_seed_checkpoint", "--checkpoint.folder=.")
        losses(folder, str(ROOT / "train_configs" / "debug_local.toml"), *make_seed, ranks=1)
        start = f"--checkpoint.initial_load_path={folder / 'step-0'}"
        tp = losses(folder / "tp", TP, start)
        planted = losses(folder / "planted", EP, start, sabotage=flat_offset)
        curves = {
            "tp": ("FSDP2 x TP2", tp),
            "flat_offset": ("FSDP2 x TP2 x EP2, flat offset", planted),
            "ours": ("FSDP2 x TP2 x EP2", losses(folder / "ours", EP, start)),
        }
    close_pools()
    for key, (title, curve) in curves.items():
        shown = {title: curve} if key == "tp" else {title: curve, "FSDP2 x TP2": tp}
        (out / f"seed_003_{key}.svg").write_text(svg.lines(shown) + "\n", encoding="utf-8")
        worst = max(relative(base, other) for (_, base), (_, other) in zip(tp, curve, strict=True))
        sys.stdout.write(f"{title}: loss {curve[0][1]:.6f} to {curve[-1][1]:.6f}, at most {worst:.1e} off\n")


if __name__ == "__main__":
    main()
