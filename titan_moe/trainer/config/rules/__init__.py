"""Rules across keys, each a function of Facts that raises Broken. All run before any process group exists."""

from collections.abc import Callable

from titan_moe.trainer.config.build import TypedConfig
from titan_moe.trainer.config.errors import ConfigError
from titan_moe.trainer.config.rules import experts, mesh, numerics, replay, run, stock
from titan_moe.trainer.config.rules.facts import Broken, Facts
from titan_moe.trainer.config.toml import Settings

# In this order: later rules divide by numbers that earlier ones have checked.
RULES: tuple[Callable[[Facts], None], ...] = (
    *run.RANGES_FIRST,
    *mesh.RULES,
    *experts.RULES,
    *run.RULES,
    *replay.RULES,
    *stock.RULES,
    *numerics.RULES,
)


def check(plan: TypedConfig, *, world_size: int, settings: Settings) -> None:
    """Applies every rule.

    Raises:
        ConfigError: the first broken one.
    """
    facts = Facts(plan=plan, world_size=world_size)
    for rule in RULES:
        try:
            rule(facts)
        except Broken as broken:
            raise ConfigError(f"{settings.blame(str(broken))}: {broken}") from None
