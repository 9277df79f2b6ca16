"""``python -m titan_moe.numerics compare BASE CANDIDATE``: are two runs the same, and if not, where and why.

BASE and CANDIDATE are configurations, "CONFIG.toml[@RANKS] [--section.key=value ...]", or dump folders of
runs that were made with --numerics.capture. What follows ``--`` goes to both runs. Exit status: 0 within
tolerance, 1 beyond, 2 for a wrong call or a run that failed.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from titan_moe.numerics import page, report, table
from titan_moe.numerics.compare import born_inside, compare
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.progress import Progress
from titan_moe.numerics.report import Report
from titan_moe.numerics.runs import STOCK, RunError, Runs, Side


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    own, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = _parser().parse_args(own)
    if args.command == "table":
        return _table(args)
    out = Path(args.out or tempfile.mkdtemp(prefix="numerics-"))
    try:
        found = _compare(args, out, list(overrides))
    except (RunError, CaptureError) as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    report.write_json(out / "report.json", found)
    page.write(out / "report.html", found)
    print(report.console(found))
    print(f"report: {out / 'report.html'}")
    return 1 if found.free.problems else 0


def _table(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="numerics-") as folder, Progress() as progress:
        runs = Runs(Path(folder), steps=table.STEPS, overrides=[], progress=progress)
        last = ""
        for last in table.write(runs, args.lines or set(table.numbered())):
            print(last, flush=True)
    return 0 if last.endswith(": nothing") else 1


def _compare(args: argparse.Namespace, out: Path, overrides: list[str]) -> Report:
    tolerances = {"rtol": args.rtol, "module_rtol": args.module_rtol}
    about = {"baseline": args.base, "candidate": args.candidate, "overrides": " ".join(overrides) or "none"}
    if Path(args.base).is_dir() and Path(args.candidate).is_dir():
        if args.stock or args.replay_routing:
            raise RunError("--stock and --replay-routing make runs: give configurations, not folders")
        first, second = (Captured(Path(folder)) for folder in (args.base, args.candidate))
        return Report(about=about, free=compare(first, second, **tolerances))
    if args.stock and args.replay_routing:
        raise RunError("--replay-routing with --stock: torchtitan's router takes no routes; leave one out")
    base, candidate = Side.of(args.base), Side.of(args.candidate)
    if args.stock:
        candidate = candidate.but(STOCK)
        about["candidate"] += " with torchtitan's own MoE"
    trace = f"--routing_replay.path={(out / 'trace').resolve()}"
    with Progress() as progress:
        runs = Runs(out, steps=args.steps, overrides=overrides, progress=progress)
        recording = ["--routing_replay.mode=record", trace] if args.replay_routing else []
        first = runs.captured("baseline", base, *recording)
        second = runs.captured("candidate", candidate)
        fed = ("--training.steps=1", f"--numerics.inputs_of={first.folder}")
        born = born_inside(first, runs.captured("forced", candidate, *fed))
        found = Report(about=about, free=compare(first, second, **tolerances), born=born)
        if args.replay_routing:
            third = runs.captured("replayed", candidate, "--routing_replay.mode=replay", trace)
            found.replayed, found.routing = compare(first, third, **tolerances), compare(third, second)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_moe.numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="two configurations, or two dump folders")
    command.add_argument("base")
    command.add_argument("candidate")
    command.add_argument("--steps", type=_positive, default=10, help="of both runs (10)")
    command.add_argument("--stock", action="store_true", help="torchtitan's own MoE in CANDIDATE's place")
    command.add_argument("--replay-routing", action="store_true", help="a further run, on BASE's routes")
    command.add_argument("--rtol", type=float, help="of losses after the first (fp32: 1e-4, bf16: 1e-3)")
    command.add_argument("--module-rtol", type=float, help="of modules, step 1 (fp32: 1e-5, bf16: 1e-2)")
    command.add_argument("--out", help="folder for runs and report (a temporary one)")
    lines = commands.add_parser("table", help="what we hold, every mesh and dispatcher; an hour on 2 cores")
    lines.add_argument("--lines", type=_numbers, help="only these, by their numbers: 3,5-7")
    return parser


def _numbers(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range such as 5-7")
        found |= set(range(int(first), int(last or first) + 1))
    if unknown := found - table.numbered().keys():
        raise argparse.ArgumentTypeError(f"there are lines 1 to {len(table.numbered())}, not {min(unknown)}")
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of steps")
    return number


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
