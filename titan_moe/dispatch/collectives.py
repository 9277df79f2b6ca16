"""The collectives the dispatchers use, behind one seam each. Functional, so autograd and SAC see them."""

from typing import NamedTuple

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single
from torch.distributed.device_mesh import DeviceMesh


class Exchange(NamedTuple):
    """The row counts of one all-to-all.

    Attributes:
        num_tokens_Se: ``(S source ranks, e)`` int64: rows coming in per source rank and local expert.
        send_splits: host ints, rows to each EP rank.
        receive_splits: host ints, rows from each EP rank.
    """

    num_tokens_Se: torch.Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]


@torch.no_grad()
def exchange_counts(num_tokens_per_expert_E: torch.Tensor, ep_mesh: DeviceMesh | None) -> Exchange:
    """Tells each EP rank how many rows will come to each of its experts. None: this rank is alone.

    The one host sync of a forward: a variable-size all-to-all takes its splits on the host.
    """
    if ep_mesh is None:
        return Exchange(num_tokens_per_expert_E.unsqueeze(0), (), ())
    num_sent_Se = num_tokens_per_expert_E.view(ep_mesh.size(), -1)
    num_tokens_Se = wait(all_to_all_single(num_sent_Se, None, None, ep_mesh)).view_as(num_sent_Se)
    sent, received = torch.stack([num_sent_Se.sum(1), num_tokens_Se.sum(1)]).tolist()
    return Exchange(num_tokens_Se, tuple(sent), tuple(received))


def exchange_rows(
    rows_ND: torch.Tensor,
    *,
    send_splits: tuple[int, ...],
    receive_splits: tuple[int, ...],
    ep_mesh: DeviceMesh | None,
) -> torch.Tensor:
    """``(R, D)``: this rank's share of all EP ranks' rows, ordered by source rank. Differentiable."""
    if ep_mesh is None:
        return rows_ND
    return wait(all_to_all_single(rows_ND, list(receive_splits), list(send_splits), ep_mesh))


def wait(tensor: torch.Tensor) -> torch.Tensor:
    """The finished tensor: indexing kernels and custom autograd must not see a pending collective."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
