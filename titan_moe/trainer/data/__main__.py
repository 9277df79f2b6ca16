"""``python -m titan_moe data build-tokenizer [--out DIR] [--check]``: rebuild or check the tokenizer."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from titan_moe.trainer.data.bpe import DIFFERENT, TOKENIZER_DIR, check_tokenizer, write_tokenizer
from titan_moe.trainer.data.corpus import DataError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and prints one line.

    Returns:
        0 done or identical, 1 different or failed, 3 where this Python's library is not the recorded one.
    """
    parser = argparse.ArgumentParser(prog="python -m titan_moe data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build-tokenizer", help="train the 2,048-entry BPE on the standard library")
    build.add_argument("--out", type=Path, help="folder to write, or to check (default: the shipped one)")
    build.add_argument("--check", action="store_true", help="write nothing; exit 0, 1 or 3 as described")
    args = parser.parse_args(argv)
    try:
        code, line = check_tokenizer(args.out or TOKENIZER_DIR) if args.check else write_tokenizer(args.out)
    except DataError as error:
        code, line = DIFFERENT, str(error)
    print(line, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
