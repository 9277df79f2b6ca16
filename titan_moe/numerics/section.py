"""``[numerics]``: the keys."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class Numerics:
    """What a run writes down about its numbers, for ``python -m titan_moe numerics compare``."""

    capture: bool = False
    whole_steps: int = 1  # of the first steps, whole gradients and the inputs of sublayers are saved
    inputs_of: str | None = None  # a captured run's folder: its sublayer inputs take the place of our own
