"""The MoE layer: router, dispatch, experts, and what they need. Nothing here knows of a trainer."""
