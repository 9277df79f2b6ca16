"""DeepSeek-V3 (arXiv 2412.19437): torchtitan's model, our MoE."""

from typing import Any

from torchtitan.models.deepseek_v3 import model_registry
from torchtitan.protocols.model_spec import ModelSpec

from titan_moe.models.swap import swap_spec

FLAVORS = ("debugmodel", "16B", "671B")


def build_spec(flavor: str, *, dispatcher: str, dispatcher_options: dict[str, Any]) -> ModelSpec:
    """torchtitan's spec of this flavor, swapped."""
    return swap_spec(model_registry(flavor), dispatcher=dispatcher, dispatcher_options=dispatcher_options)
