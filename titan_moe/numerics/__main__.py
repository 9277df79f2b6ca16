"""``python -m titan_moe.numerics compare BASE CANDIDATE``: are two runs the same, and if not, where and why.

BASE and CANDIDATE are configurations, CONFIG.toml or CONFIG.toml@RANKS, or dump folders of runs that were
made with --numerics.capture. What follows ``--`` goes to both runs. Exit status: 0 within tolerance,
1 beyond, 2 for a wrong call or a run that failed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from titan_moe.numerics import report
from titan_moe.numerics.compare import Comparison, Tolerance, compare
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.runs import Run, RunError


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    own, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = _parser().parse_args(own)
    tolerance = Tolerance(loss=args.rtol, module=args.module_rtol)
    out = Path(args.out or tempfile.mkdtemp(prefix="numerics-"))
    try:
        free, replayed = _compare(args, out, list(overrides), tolerance)
    except (RunError, CaptureError) as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2
    about = {"baseline": args.base, "candidate": args.candidate, "overrides": " ".join(overrides) or "none"}
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / "report.json", free, replayed, about)
    report.write_html(out / "report.html", free, replayed, about)
    print(report.console(free, replayed, base="baseline", candidate="candidate"))
    print(f"report: {out / 'report.html'}")
    return 0 if free.bitwise or not free.problems else 1


def _compare(
    args: argparse.Namespace, out: Path, overrides: list[str], tolerance: Tolerance
) -> tuple[Comparison, Comparison | None]:
    if Path(args.base).is_dir() and Path(args.candidate).is_dir():
        return compare(Captured(Path(args.base)), Captured(Path(args.candidate)), tolerance), None
    base = Run.of("baseline", args.base, out, overrides)
    candidate = Run.of("candidate", args.candidate, out, overrides)
    _progress("seed checkpoint")
    start = [
        "--checkpoint.enable",
        f"--checkpoint.initial_load_path={base.seed(_progress).resolve()}",
        "--checkpoint.interval=1000000",
        "--numerics.capture",
    ]
    trace = f"--routing_replay.path={(out / 'trace').resolve()}"
    recording = ["--routing_replay.mode=record", trace] if args.replay_routing else []
    first = Captured(base.start(*start, *recording, steps=args.steps, progress=_progress))
    second = Captured(candidate.start(*start, steps=args.steps, progress=_progress))
    replayed = None
    if args.replay_routing:
        again = Run.of("replayed", args.candidate, out, overrides)
        third = again.start(
            *start, "--routing_replay.mode=replay", trace, steps=args.steps, progress=_progress
        )
        replayed = compare(first, Captured(third), tolerance)
    _progress("")
    return compare(first, second, tolerance), replayed


def _progress(line: str) -> None:
    """One line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m titan_moe.numerics", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="two configurations, or two dump folders")
    command.add_argument("base")
    command.add_argument("candidate")
    command.add_argument("--steps", type=int, default=10, help="of both runs (10)")
    command.add_argument("--replay-routing", action="store_true", help="a third run, on BASE's routes")
    command.add_argument("--rtol", type=float, default=1e-4, help="of the losses after the first (1e-4)")
    command.add_argument("--module-rtol", type=float, default=1e-5, help="of modules' outputs, step 1 (1e-5)")
    command.add_argument("--out", help="folder for runs and report (a temporary one)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
