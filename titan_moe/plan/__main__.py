"""``python -m titan_moe plan CONFIG.toml [--section.key value ...]``: a run's memory and traffic, unpaid.

Ranks are counted as the config check counts them: NGPU * NNODES. Also by
``COMM_MODE=fake_backend NGPU=512 ./run_train.sh CONFIG.toml``. Flags of its own:

    --memory-gib 80        what a rank may use
    --ranks-per-node 8     NGPU where NNODES is more than 1
    --json FILE            the findings in bytes
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code, 2 for a wrong config or flag."""
    from titan_moe.trainer.config import ConfigError
    from titan_moe.trainer.config.job import world_size_from_env

    try:
        flags, config = _parse(argv)
        world_size = world_size_from_env()
        nodes = int(os.environ.get("NNODES", "1"))
        ranks_per_node = flags.ranks_per_node or (world_size // nodes if nodes > 1 else 8)
        _refuse_a_gpu()
        # Hundreds of lines of torchtitan's progress are not the plan.
        logging.disable(logging.INFO)
        from titan_moe.plan import findings, table

        found = findings.find(config, world_size, ranks_per_node)
    except ConfigError as error:
        print(f"titan_moe: {error}", file=sys.stderr)
        return 2
    finally:
        logging.disable(logging.NOTSET)
    if flags.json is not None:
        flags.json.write_text(json.dumps(table.as_json(found, flags.memory_gib), indent=1), encoding="utf-8")
    print(table.page(found, flags.memory_gib), end="")
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    from titan_moe.trainer.config import ConfigError

    def fail(message: str) -> None:
        raise ConfigError(f"command line: {message}")

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = fail  # type: ignore[method-assign, assignment]
    parser.add_argument("--memory-gib", type=float, default=80.0)
    parser.add_argument("--ranks-per-node", type=int, default=0)
    parser.add_argument("--json", type=Path)
    flags, config = parser.parse_known_args(argv)
    if not 0 < flags.memory_gib < float("inf"):
        fail(f"--memory-gib ({flags.memory_gib:g}) must be more than 0")
    if flags.ranks_per_node < 0:
        fail(f"--ranks-per-node ({flags.ranks_per_node}) must be at least 1")
    if flags.json is not None and not flags.json.parent.is_dir():
        fail(f"--json ({flags.json}): no folder {flags.json.parent}")
    if flags.json is not None and flags.json.is_dir():
        fail(f"--json ({flags.json}) is a folder; name a file")
    return flags, config


def _refuse_a_gpu() -> None:
    """torchtitan decides for a device when it is imported, and fake tensors here are the CPU's."""
    from torchtitan.tools.utils import device_type

    from titan_moe.trainer.config import ConfigError

    if device_type != "cpu":
        raise ConfigError(
            f"the plan runs without a device, and here is {device_type}; set CUDA_VISIBLE_DEVICES="
        )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
