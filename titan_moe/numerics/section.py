"""``[numerics]``: the keys."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Numerics:
    """What a run writes down about its numbers, for ``python -m titan_moe.numerics compare``."""

    capture: bool = False
    gradient_steps: int = 1  # of the first steps, whole gradients are saved
