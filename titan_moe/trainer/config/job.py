"""From an argument vector to a Job, and a Job to its file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from titan_moe.trainer.config import toml
from titan_moe.trainer.config.errors import ConfigError

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer

    from titan_moe.numerics.section import Numerics
    from titan_moe.replay.section import RoutingReplay


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked configuration.

    Attributes:
        trainer: torchtitan's config, its ``model_spec`` set.
        routing_replay, numerics: ours, for ``titan_moe.trainer.train``.
        resolved: every section, key and value in force, in the file format.
        config_file: where it came from.
    """

    trainer: "Trainer.Config"
    routing_replay: "RoutingReplay"
    numerics: "Numerics"
    resolved: dict[str, Any]
    config_file: Path


def load(argv: Sequence[str], *, world_size: int | None = None) -> Job:
    """Reads, types and checks ``[CONFIG.toml, --section.key, value, ...]``. Starts no process group.

    Args:
        argv: the command line wins over the file, the file over the defaults.
        world_size: how many ranks will run; None reads WORLD_SIZE, else NGPU (4) * NNODES (1).

    Raises:
        ConfigError: one line, for the first thing that is wrong.
    """
    settings = toml.read(argv)
    if world_size is None:
        world_size = world_size_from_env()
    # torchtitan takes seconds to import: not before the file is known to be readable.
    from titan_moe.trainer.config import rules
    from titan_moe.trainer.config.build import build
    from titan_moe.trainer.config.resolved import resolve

    plan = build(settings)
    rules.check(plan, world_size=world_size, settings=settings)
    return Job(
        trainer=plan.trainer,
        routing_replay=plan.routing_replay,
        numerics=plan.numerics,
        resolved=resolve(plan),
        config_file=settings.config_file,
    )


def write_resolved(job: Job, path: Path) -> None:
    """Writes ``job.resolved`` as TOML; loading that file gives an equal ``resolved``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps(job.resolved), encoding="utf-8")


def world_size_from_env() -> int:
    """torchrun's WORLD_SIZE, else what run_train.sh would start: NGPU * NNODES.

    Raises:
        ConfigError: one of them is not a positive integer.
    """
    if "WORLD_SIZE" in os.environ:
        return _count("WORLD_SIZE", "1")
    return _count("NGPU", "4") * _count("NNODES", "1")


def _count(name: str, default: str) -> int:
    text = os.environ.get(name, default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment: {name} ({text!r}) must be a positive integer")
    return int(text)
