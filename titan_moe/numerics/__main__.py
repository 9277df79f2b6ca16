"""``python -m titan_moe numerics compare BASE CANDIDATE``: are two runs the same, and if not, where and why.

BASE and CANDIDATE are configurations, "CONFIG.toml[@RANKS] [--section.key=value ...]", or dump folders of
runs that were made with --numerics.capture. What follows ``--`` goes to both runs. Exit status: 0 within
tolerance, 1 beyond, 2 for a wrong call or a run that failed.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from titan_moe.numerics import page, report, table
from titan_moe.numerics.compare import born_inside, compare, refuse_other_data
from titan_moe.numerics.load import Captured, CaptureError
from titan_moe.numerics.progress import Progress
from titan_moe.numerics.report import Report
from titan_moe.numerics.runs import STOCK, RunError, Runs, Side, claim

DEFAULT_STEPS = 10


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit status."""
    own, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = _parser().parse_args(own)
    try:
        return _table(args, list(overrides)) if args.command == "table" else _compare(args, list(overrides))
    except (RunError, CaptureError, OSError) as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2


def _table(args: argparse.Namespace, overrides: list[str]) -> int:
    wanted = set(table.numbered()) if args.lines is None else args.lines
    with tempfile.TemporaryDirectory(prefix="numerics-") as folder, Progress() as progress:
        runs = Runs(
            Path(folder),
            steps=table.STEPS,
            overrides=overrides,
            progress=progress,
            timeout_s=args.timeout,
        )
        last = ""
        for last in table.write(runs, wanted):
            print(last, flush=True)
    return 0 if last.endswith(": nothing") else 1


def _compare(args: argparse.Namespace, overrides: list[str]) -> int:
    sides = [Path(args.base), Path(args.candidate)]
    folders = [side.is_dir() for side in sides]
    if any(folders) and not all(folders):
        raise RunError("a dump folder and a configuration: give two of one kind")
    if all(folders) and (args.stock or args.replay_routing or args.steps or overrides):
        raise RunError("--stock, --replay-routing, --steps and overrides make runs; these are dump folders")
    if args.stock and args.replay_routing:
        raise RunError("--replay-routing with --stock: torchtitan's router takes no routes; leave one out")
    # All that can be refused is, before a folder is made or emptied.
    named = None if all(folders) else (Side.of(args.base), Side.of(args.candidate))
    out = Path(args.out or tempfile.mkdtemp(prefix="numerics-"))
    claim(out)
    found = _folders(args, sides) if named is None else _runs(args, *named, out, overrides)
    report.write_json(out / "report.json", found)
    page.write(out / "report.html", found)
    print(report.console(found))
    print(f"report: {out / 'report.html'}")
    return 1 if found.free.problems else 0


def _folders(args: argparse.Namespace, sides: list[Path]) -> Report:
    base, candidate = (Captured(side) for side in sides)
    about = {"baseline": args.base, "candidate": args.candidate}
    return Report(about=about, free=compare(base, candidate, **_tolerances(args)))


def _runs(args: argparse.Namespace, base: Side, candidate: Side, out: Path, overrides: list[str]) -> Report:
    about = {"baseline": args.base, "candidate": args.candidate, "overrides": " ".join(overrides) or "none"}
    if args.stock:
        candidate = candidate.but(STOCK)
        about["candidate"] += " with torchtitan's own MoE"
    trace = f"--routing_replay.path={(out / 'trace').resolve()}"
    steps = args.steps or DEFAULT_STEPS
    with Progress() as progress:
        runs = Runs(out, steps=steps, overrides=overrides, progress=progress, timeout_s=args.timeout)
        recording = ["--routing_replay.mode=record", trace] if args.replay_routing else []
        first = runs.captured("baseline", base, *recording)
        second = runs.captured("candidate", candidate)
        refuse_other_data(first, second)
        fed = ("--training.steps=1", f"--numerics.inputs_of={first.folder.resolve()}")
        born = born_inside(first, runs.captured("fed", candidate, *fed))
        found = Report(about=about, free=compare(first, second, **_tolerances(args)), born=born)
        if args.replay_routing:
            third = runs.captured("replayed", candidate, "--routing_replay.mode=replay", trace)
            found.replayed, found.routing = compare(first, third, **_tolerances(args)), compare(third, second)
    return found


def _tolerances(args: argparse.Namespace) -> dict[str, Any]:
    return {"rtol": args.rtol, "module_rtol": args.module_rtol}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titan_moe numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("compare", help="two configurations, or two dump folders")
    command.add_argument("base")
    command.add_argument("candidate")
    command.add_argument("--steps", type=_positive, help=f"of both runs ({DEFAULT_STEPS})")
    command.add_argument("--stock", action="store_true", help="torchtitan's own MoE in CANDIDATE's place")
    command.add_argument("--replay-routing", action="store_true", help="a further run, on BASE's routes")
    command.add_argument("--rtol", type=float, help="of losses after the first (fp32: 1e-4, bf16: 1e-3)")
    command.add_argument("--module-rtol", type=float, help="of modules, step 1 (fp32: 1e-5, bf16: 1e-2)")
    command.add_argument("--out", help="a new folder, or one of an earlier call (a temporary one)")
    lines = commands.add_parser("table", help="what we hold, every mesh and dispatcher; an hour on 2 cores")
    lines.add_argument("--lines", type=_numbers, help="only these, by their numbers: 3,5-7")
    for each in (command, lines):
        each.add_argument("--timeout", type=float, default=1800.0, help="seconds, of each run (1800)")
    return parser


def _numbers(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
            raise argparse.ArgumentTypeError(f"{part!r} is neither a number nor a range such as 5-7")
        found |= set(range(int(first), int(last or first) + 1))
    if unknown := found - table.numbered().keys():
        raise argparse.ArgumentTypeError(f"there are lines 1 to {len(table.numbered())}, not {min(unknown)}")
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of steps")
    return int(text)


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt  # runs are ended on the way out


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
