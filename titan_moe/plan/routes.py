"""Answers to the one question that a dispatcher asks the device, where there are no tokens to count."""

from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.dispatch.ownership import Ownership
from titan_moe.layer.dispatch.uniform import ranks_per_token

Load = Literal["balanced", "worst"]


class RehearsedRoutes:
    """Rows to and from each EP rank: what ``FakeTensor.tolist`` answers while this is entered.

    ``balanced``: each rank sends, and gets, the same. ``worst``: every token of the EP group takes as many of
    this rank's experts as it can, so that the most rows arrive that can.
    """

    def __init__(self, limits: DispatchLimits, load: Load) -> None:
        self.ep_size = limits.ep_size
        tokens, slots = limits.num_max_tokens_per_rank, limits.num_max_tokens_per_rank * limits.top_k
        if load == "balanced" or self.ep_size == 1:
            reached = ranks_per_token(
                limits.num_experts,
                limits.top_k,
                limits.ep_size,
                num_expert_groups=limits.num_expert_groups,
                num_limited_groups=limits.num_limited_groups,
            )
            sent = received = _even(slots, self.ep_size)
            copies_sent = copies_received = _even(round(tokens * reached), self.ep_size)
        else:
            here = tokens * min(limits.top_k, Ownership(limits.num_experts, self.ep_size).num_local_experts)
            sent = [here, *_even(slots - here, self.ep_size - 1)]
            received = [here] * self.ep_size
            copies_sent = [tokens, *(min(tokens, rows) for rows in sent[1:])]
            copies_received = [tokens] * self.ep_size
        self.rows = [sent, received]
        self.with_copies = [sent + copies_sent, received + copies_received]

    @property
    def rows_received(self) -> int:
        """R: what the local experts compute on."""
        return sum(self.rows[1])

    def __enter__(self) -> "RehearsedRoutes":
        self._plain = FakeTensor.tolist
        setattr(FakeTensor, "tolist", lambda counts: self._answer(counts))  # noqa: B010
        return self

    def __exit__(self, *_: object) -> None:
        setattr(FakeTensor, "tolist", self._plain)  # noqa: B010

    def _answer(self, counts: torch.Tensor) -> list[list[int]]:
        for answer in (self.rows, self.with_copies):
            if list(counts.shape) == [len(answer), len(answer[0])]:
                return answer
        raise RuntimeError(f"the plan has no answer for a host sync of shape {tuple(counts.shape)}")


def _even(total: int, parts: int) -> list[int]:
    """``total`` in parts as equal as can be, larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
