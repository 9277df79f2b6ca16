"""``python -m titan_moe bench``: our MoE layer beside torchtitan's, in one run.

Markdown on stdout. What is timed is timed in turns, A B A B; bytes are exact.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titan_moe.bench import (
    bandwidth,
    bytes_moved,
    clock,
    ep,
    growth,
    layer,
    machine,
    memory,
    plot,
    step,
    targets,
    wire,
)
from titan_moe.bench.dispatchers import markdown
from titan_moe.bench.report import BenchSettings, Found

# Each has TITLE, NOTE, measure, tables and figures. The layer and its floor take their turns together.
PARTS: dict[str, Any] = {
    "layer": layer,
    "floor": layer,
    "memory": memory,
    "traffic": bytes_moved,
    "kernels": bandwidth,
    "growth": growth,
    "wire": wire,
    "ep": ep,
    "step": step,
}


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes what was asked for."""
    args = _parser().parse_args(argv)
    settings = BenchSettings(world_size=args.world_size, quick=args.quick, only=tuple(args.only or ()))
    clock.keep_memory()
    clock.keep_kernels()
    about = machine.describe(argv)
    _say(machine.line(about))
    if about["load_before"] > about["cores"]:
        _say(f"Others are at work here (load {about['load_before']:.1f}): bytes are exact, times are not.")
    if args.quick:
        _say("Quick: small shapes and few runs; the times mean little.")
    found: dict[str, Found] = {}
    figures: dict[str, float] = {}
    for module in dict.fromkeys(PARTS[name] for name in settings.only or PARTS):
        name = next(name for name in PARTS if PARTS[name] is module)
        sys.stderr.write(f"{name} ...\n")
        found[name] = module.measure(settings)
        if not found[name]:
            continue
        figures |= module.figures(found[name])
        _say(f"## {module.TITLE}\n\n{module.NOTE}")
        for table in module.tables(found[name], settings):
            _say(markdown(iter(table)))
    _say(f"## Targets\n\n{markdown(iter(targets.table(figures)))}")
    if args.json:
        whole = {"machine": about, "parts": found, "figures": figures, "targets": [*targets.judged(figures)]}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        args.plot.write_text(plot.picture(found), encoding="utf-8")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text.rstrip()}\n\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_moe bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--world-size", type=_positive, default=4, metavar="N", help="the most ranks (4)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small shapes, few runs: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every number")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="layer and growth as a picture")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of ranks")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
