"""What ranks tell each other on the host: gloo, so that no device waits for it."""

from typing import Any

import torch.distributed as dist

from titan_moe.replay.ids import ReplayDataError


class Together:
    """The ranks that share a replay. Every call is collective over them."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """``group`` must be able to gather objects; None: a gloo group of all ranks, made here."""
        self.group: Any = group
        if group is None and dist.is_initialized():
            self.group = dist.new_group(backend="gloo")
        self.rank = dist.get_rank(self.group) if self.group is not None else 0

    def gather(self, mine: Any) -> list[Any]:
        """Everyone's, by rank."""
        if self.group is None:
            return [mine]
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def raise_together(self, error: Exception | None) -> None:
        """Raises on all ranks where one has an error: its own there, a ReplayDataError elsewhere."""
        text = None
        if error is not None:
            text = str(error) if isinstance(error, ReplayDataError) else f"{type(error).__name__}: {error}"
        found = [(rank, said) for rank, said in enumerate(self.gather(text)) if said is not None]
        if error is not None:
            raise error
        if found:
            raise ReplayDataError(f"rank {found[0][0]}: {found[0][1]}")
