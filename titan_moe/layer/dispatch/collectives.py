"""The collectives the dispatchers use, behind one seam each. Functional, so autograd and SAC see them."""

from typing import NamedTuple

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh


class Splits(NamedTuple):
    """Rows per EP rank of one all-to-all, on the host; both empty when this rank is alone."""

    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()

    def back(self) -> "Splits":
        """The way back."""
        return Splits(self.received, self.sent)


class Counts(NamedTuple):
    """What the EP ranks told each other before the rows move.

    Attributes:
        num_tokens_Se: ``(S source ranks, e)`` int64: rows for each local expert per source rank.
        rows: splits of one row per routed slot.
        copies: splits of one row per token and rank, where asked for.
    """

    num_tokens_Se: torch.Tensor
    rows: Splits = Splits()
    copies: Splits = Splits()

    @property
    def num_rows_sent(self) -> int | None:
        """Where ranks were asked; a rank alone has not looked."""
        return sum(self.rows.sent) if self.rows.sent else None


@torch.no_grad()
def exchange_counts(
    num_tokens_per_expert_E: torch.Tensor,
    ep_mesh: DeviceMesh | None,
    num_copies_S: torch.Tensor | None = None,
) -> Counts:
    """Tells each EP rank how many rows will come to each of its experts. No mesh: this rank is alone.

    The one host sync of a forward: a variable-size all-to-all takes its splits on the host.

    Args:
        num_copies_S: int64: tokens that go to each rank; told in the same exchange.
    """
    if ep_mesh is None:
        return Counts(num_tokens_per_expert_E.unsqueeze(0))
    sent = num_tokens_per_expert_E.view(ep_mesh.size(), -1)
    num_experts = sent.shape[1]
    if num_copies_S is not None:
        sent = torch.cat([sent, num_copies_S.unsqueeze(1)], dim=1)
    received = wait(all_to_all_single(sent, None, None, ep_mesh)).view_as(sent)
    both = torch.stack([sent, received])
    totals = torch.cat([both[..., :num_experts].sum(-1), both[..., num_experts:].flatten(1)], dim=1)
    split = [(tuple(side[: ep_mesh.size()]), tuple(side[ep_mesh.size() :])) for side in totals.tolist()]
    rows, copies = (Splits(*sides) for sides in zip(*split, strict=True))
    return Counts(received[:, :num_experts], rows, copies)


def exchange_rows(rows_ND: torch.Tensor, splits: Splits, ep_mesh: DeviceMesh | None) -> torch.Tensor:
    """``(R, D)``: this rank's share of all EP ranks' rows, ordered by source rank. Differentiable."""
    return wait(start_exchange(rows_ND, splits, ep_mesh))


def start_exchange(rows_ND: torch.Tensor, splits: Splits, ep_mesh: DeviceMesh | None) -> torch.Tensor:
    """``exchange_rows`` in flight: ``wait`` before anything else is done with it."""
    if ep_mesh is None:
        return rows_ND
    return all_to_all_single(rows_ND, list(splits.received), list(splits.sent), ep_mesh)


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """The finished tensor: indexing kernels and custom autograd must not see a pending collective."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
