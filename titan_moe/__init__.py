"""titan_moe: the Mixture-of-Experts component for TorchTitan, right on every mesh and every shape.

Importing the package does not import torch and changes nothing in it. What a name below stands for is
imported when the name is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_moe.layer.dispatch.base import DispatchMetadata, Routing, TokenDispatcher
    from titan_moe.layer.experts import GroupedExperts
    from titan_moe.layer.layout import TokenLayout
    from titan_moe.layer.load_balance import LoadBalancer
    from titan_moe.layer.moe import MoE, RoutedExperts
    from titan_moe.layer.router import TokenChoiceTopKRouter
    from titan_moe.models.swap import swap_moe
    from titan_moe.parallel.initialization import drawn_by_name
    from titan_moe.replay.rl import RolloutReplay

__version__ = "0.1.0"

_HOMES = {
    "DispatchMetadata": "titan_moe.layer.dispatch.base",
    "GroupedExperts": "titan_moe.layer.experts",
    "LoadBalancer": "titan_moe.layer.load_balance",
    "MoE": "titan_moe.layer.moe",
    "RolloutReplay": "titan_moe.replay.rl",
    "RoutedExperts": "titan_moe.layer.moe",
    "Routing": "titan_moe.layer.dispatch.base",
    "TokenChoiceTopKRouter": "titan_moe.layer.router",
    "TokenDispatcher": "titan_moe.layer.dispatch.base",
    "TokenLayout": "titan_moe.layer.layout",
    "drawn_by_name": "titan_moe.parallel.initialization",
    "swap_moe": "titan_moe.models.swap",
}
__all__ = [
    "DispatchMetadata",
    "GroupedExperts",
    "LoadBalancer",
    "MoE",
    "RolloutReplay",
    "RoutedExperts",
    "Routing",
    "TokenChoiceTopKRouter",
    "TokenDispatcher",
    "TokenLayout",
    "drawn_by_name",
    "swap_moe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'titan_moe' has no attribute {name!r}; its names are {', '.join(_HOMES)}"
        )
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
