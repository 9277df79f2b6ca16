"""DeepSeek-V3 (arXiv 2412.19437)."""

from torchtitan.models.deepseek_v3 import model_registry

# Ours to torchtitan's.
FLAVORS = {flavor: flavor for flavor in ("debugmodel", "16B", "671B")}
upstream_spec = model_registry
