"""``[routing_replay]``: the keys."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True, slots=True)
class RoutingReplay:
    """docs/replay.md says what each is for."""

    mode: Literal["off", "record", "replay"] = "off"
    path: str = ""  # the trace's folder; empty: routing_trace in the dump folder
    layers: list[str] = field(default_factory=list)  # numbers and ranges of decoder layers: ["1-3", "7"]
    recompute_pin: bool = True  # recomputation routes as its forward did, whatever the mode
    fill: Literal["score", "balanced"] = "score"  # where ids are missing
    fill_weight: Literal["live", "zero"] = "live"  # of a filled pick
    check: bool = False  # evidence, and a verdict per step
    check_max_zero_overlap: float = 1e-2  # part of tokens that share no expert with the live routers
    check_min_mean_overlap: float = 0.0
    check_weights: bool = True  # a trace from the same step must come from the same weights

    def chosen(self, layer: str) -> bool:
        """Whether a layer, by its name, takes part."""
        if not self.layers:
            return True
        number = layer_number(layer)
        return number is not None and any(first <= number <= last for first, last in self.ranges())

    def ranges(self) -> list[tuple[int, int]]:
        """``layers`` as inclusive ranges. Raises ValueError for anything else."""
        found = []
        for text in self.layers:
            first, dash, last = text.partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                raise ValueError(f"{text!r} is neither a number nor a range such as '1-3'")
            found.append((int(first), int(last) if dash else int(first)))
        return found


def layer_number(layer: str) -> int | None:
    """The decoder layer in a name such as ``layers.3.moe``; None where there is none (MTP blocks)."""
    parts = layer.split(".")
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 1 and parts[1].isdecimal() else None
