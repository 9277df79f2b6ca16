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
    sent_Se = num_tokens_per_expert_E.view(ep_mesh.size(), -1)
    copies_S1 = torch.zeros_like(sent_Se[:, :1]) if num_copies_S is None else num_copies_S.unsqueeze(1)
    sent = torch.cat([sent_Se, copies_S1], dim=1)
    received = wait(all_to_all_single(sent, None, None, ep_mesh)).view_as(sent)
    num_tokens_Se = received[:, :-1]
    columns = [sent_Se.sum(1), num_tokens_Se.sum(1), sent[:, -1], received[:, -1]]
    rows_sent, rows_received, copies_sent, copies_received = map(tuple, torch.stack(columns).tolist())
    return Counts(num_tokens_Se, Splits(rows_sent, rows_received), Splits(copies_sent, copies_received))


def exchange_rows(rows_ND: torch.Tensor, splits: Splits, ep_mesh: DeviceMesh | None) -> torch.Tensor:
    """``(R, D)``: this rank's share of all EP ranks' rows, ordered by source rank. Differentiable."""
    if ep_mesh is None:
        return rows_ND
    return wait(all_to_all_single(rows_ND, list(splits.received), list(splits.sent), ep_mesh))


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """The finished tensor: indexing kernels and custom autograd must not see a pending collective."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
