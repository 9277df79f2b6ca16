"""``python -m tests.seed_003``: the three pictures of pytorch/torchtitan#3604, from runs of ours.

FSDP2 x TP2; FSDP2 x TP2 x EP2 with that bug planted in every MoE layer; the same without. One seed
checkpoint, the default config (6 sequences of 128 tokens per data-parallel rank) in fp32. Left: the loss;
right: its difference from that of FSDP2 x TP2.
"""

import sys
import tempfile
from pathlib import Path

from tests.faults import FAULTS
from tests.ranks import close_pools, run_ranks
from tests.training import train
from titan_moe.layer.moe import MoE
from titan_moe.numerics import svg
from titan_moe.numerics.tolerance import relative

ROOT = Path(__file__).parent.parent
TP, EP = (str(ROOT / "train_configs" / f"debug_fsdp_{mesh}.toml") for mesh in ("tp", "tp_ep"))
LAYERS = 6  # all of the debug model's
STEPS, TIMEOUT_S = 20, 900.0


def flat_offset(moes: list[MoE]) -> None:
    """The bug, in every layer."""
    for moe in moes:
        FAULTS["flat_offset"](moe)


def losses(folder: Path, config: str, *, sabotage: object = None) -> svg.Curve:
    """Of a run in ``folder``, by step."""
    argv = [config, f"--dump_folder={folder}", "--debug.no-enable_structured_logging"]
    argv += [f"--training.steps={STEPS}", "--training.mixed_precision_param=float32"]
    results = run_ranks(train, 4, argv, None, sabotage, LAYERS, timeout_s=TIMEOUT_S)
    return [(record["step"], record["loss"]) for record in results[0]["records"]]


def main() -> None:
    """Writes the pictures and says by how much the curves differ."""
    out = ROOT / "docs" / "pictures"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tp = losses(folder / "tp", TP)
        curves = {
            "tp": ("FSDP2 x TP2, once more", losses(folder / "again", TP)),
            "flat_offset": (
                "FSDP2 x TP2 x EP2, flat offset",
                losses(folder / "planted", EP, sabotage=flat_offset),
            ),
            "ours": ("FSDP2 x TP2 x EP2", losses(folder / "ours", EP)),
        }
    close_pools()
    for key, (title, curve) in curves.items():
        gaps = [(step, relative(base, loss)) for (step, base), (_, loss) in zip(tp, curve, strict=True)]
        loss = svg.lines({title: curve, "FSDP2 x TP2": tp}, title="loss")
        gap = svg.lines({title: gaps}, log=True, decades=(-9, -2), title="relative difference")
        (out / f"seed_003_{key}.svg").write_text(svg.beside(loss, gap) + "\n", encoding="utf-8")
        worst = max(gap for _, gap in gaps)
        sys.stdout.write(f"{title}: loss {curve[0][1]:.6f} to {curve[-1][1]:.6f}, at most {worst:.1e} off\n")


if __name__ == "__main__":
    from tests import seed_003  # the workers find flat_offset there, not in __main__

    seed_003.main()
