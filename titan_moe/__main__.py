"""``python -m titan_moe COMMAND ...``, or ``titan-moe COMMAND ...``: every command of the package."""

import difflib
import runpy
import sys
from collections.abc import Sequence

# The module that is run, and what it does. run_train.sh trains; it starts the ranks first.
COMMANDS = {
    "config": ("titan_moe.trainer.config", "check a TOML file and flags, or show every key in force"),
    "plan": ("titan_moe.plan", "memory and traffic of one rank of a run, before anything is trained"),
    "numerics": (
        "titan_moe.numerics",
        "compare two runs, module by module, or print the table of what agrees",
    ),
    "convert": ("titan_moe.trainer.convert", "Hugging Face folders: export, describe, check"),
    "data": ("titan_moe.trainer.data", "rebuild or check the shipped tokenizer"),
    "dispatchers": ("titan_moe.bench.dispatchers", "what each dispatcher moves, needs and is good for"),
    "bench": ("titan_moe.bench", "time, memory and traffic beside torchtitan's own layer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command as ``python -m`` would; without one, or with ``--help``, lists them.

    Returns:
        0 after the list, 2 for a command that does not exist; otherwise the command itself exits.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(
            f"titan_moe: {name!r} is not a command (there are: {', '.join(COMMANDS)}){hint}", file=sys.stderr
        )
        return 2
    sys.argv[1:] = rest
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


def _usage() -> str:
    lines = [f"  {name:12} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m titan_moe COMMAND ...   (COMMAND --help says more)",
            "",
            *lines,
            "",
            "To train: ./run_train.sh CONFIG.toml [--section.key value ...]",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
