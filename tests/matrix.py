"""Every mesh against one rank, from one seed in fp32: the command, and the table it prints.

    python -m tests.matrix [NAME ...] [--write docs/meshes.md]

runs all cells, or those whose name holds a NAME, and prints what was held; exit status 1 where a cell is red.
tests/test_matrix.py runs the same cells.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.matrix_cell_run import LIMITS, Held, Matrix
from tests.matrix_cells import CELLS, REFUSED, ROOT, Cell
from tests.ranks import RankError, RankTimeout, close_pools
from titan_moe.trainer.config import ConfigError, load

MARKS = ("<!-- python -m tests.matrix -->", "<!-- end -->")


def table_line(cell: Cell, held: Held | None, note: str) -> str:
    """What the command prints of a cell; without figures where it did not run."""
    figures = [f"{getattr(held, key):.0e}" if held else "" for key in LIMITS]
    shape = f"{cell.seq_len:>4} {cell.local_batch:>2}"
    told = " ".join(f"{figure:>9}" for figure in figures)
    return f"{cell.ranks}  {cell.mesh:<19} {cell.what:<46} {shape}  {told}  {note}"


def _print_cells(cells: Sequence[Cell], tell: Callable[[str], None]) -> bool:
    """Runs and tells them one by one; whether all held."""
    good = True
    tell(f"{'':2} {'mesh':<19} {'what':<46} {'L':>4} {'B':>2}  " + " ".join(f"{key:>9.9}" for key in LIMITS))
    with tempfile.TemporaryDirectory(prefix="titan_moe_matrix_") as folder:
        matrix = Matrix(Path(folder))
        for number, cell in enumerate(cells):
            if number % 16 == 15:
                close_pools()  # a worker keeps about 100 MB of every run
            try:
                held = matrix.run(cell)
            except (RankError, RankTimeout) as error:
                good = False
                tell(table_line(cell, None, f"RED: {str(error).splitlines()[0][:300]}"))
                continue
            good = good and not held.problems
            tell(table_line(cell, held, f"RED: {'; '.join(held.problems)}" if held.problems else "held"))
    return good


def refusal(arguments: str) -> str:
    """What the config check says to ``arguments``; empty where it lets them pass."""
    try:
        load([str(ROOT / "train_configs" / "debug_fsdp_tp_ep.toml"), *shlex.split(arguments)], world_size=4)
    except ConfigError as error:
        return str(error)
    return ""


def main(argv: Sequence[str]) -> int:
    """The command above. Writes between the marks of the --write file, at the end and only if all was run."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only cells whose name holds one of these")
    parser.add_argument("--write", type=Path, help="put the tables between the marks of this file")
    options = parser.parse_args(argv)
    cells = [c for c in CELLS if not options.names or any(name in c.name for name in options.names)]
    if not cells:
        parser.error(f"no cell holds {' or '.join(options.names)}; their names are like {CELLS[5].name}")
    if options.write and len(cells) < len(CELLS):
        parser.error("--write wants all cells: leave the names out")
    lines: list[str] = []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line.rstrip())

    good = _print_cells(cells, tell)
    tell("")
    tell("refused before any rank starts:")
    for arguments in REFUSED:
        said = refusal(arguments)
        good = good and bool(said)
        tell(f"  {arguments}")
        tell(f"      {said or 'RED: not refused'}")
    if options.write:
        page, table = options.write.read_text(), "\n".join(lines)
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        options.write.write_text(f"{before}{MARKS[0]}\n```text\n{table}\n```\n{MARKS[1]}{after}")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    finally:
        close_pools()
    sys.exit(status)
