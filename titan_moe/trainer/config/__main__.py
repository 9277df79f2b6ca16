"""``python -m titan_moe config CONFIG.toml [--section.key value ...]``: the check before a launch.

Valid: exit 0, no output; ``--show`` prints every section, key and value in force. Wrong: one line on
stderr and exit 2. Ranks are counted as run_train.sh starts them: WORLD_SIZE, else NGPU * NNODES.
"""

import logging
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs the check; returns the exit code."""
    import tomli_w

    from titan_moe.trainer.config import ConfigError, load

    show = "--show" in argv
    # One line means one line: torchtitan's dataclasses log warnings through the root logger.
    logging.disable(logging.WARNING)
    try:
        job = load([argument for argument in argv if argument != "--show"])
    except ConfigError as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    if show:
        print(tomli_w.dumps(job.resolved), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
