"""Expert ids from elsewhere: what comes in is checked; what is missing is filled, whatever the scores are.

Missing ids are -1. The legend is in ``titan_moe/layer/moe.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from titan_moe.layer.dispatch.ownership import Ownership

MISSING = -1
_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)


class ReplayDataError(ValueError):
    """Routes that cannot be replayed; the message is one line that names sample, layer and token."""


class LayerShape(NamedTuple):
    """What the ids of a layer must fit."""

    name: str
    num_experts: int
    top_k: int


def narrowest_dtype(num_experts: int) -> torch.dtype:
    """The narrowest signed integer that holds every id and MISSING; by E, never by the ids seen."""
    return next(dtype for dtype in _DTYPES if num_experts - 1 <= torch.iinfo(dtype).max)


def ingest(
    routed_experts: torch.Tensor,
    layers: Sequence[LayerShape],
    *,
    batch_size: int,
    seq_len: int,
    columns: Sequence[int] | None = None,
    valid_BL: torch.Tensor | None = None,
) -> torch.Tensor:
    """``(B * L, layers, K)`` on the CPU, checked, in ``narrowest_dtype``.

    Args:
        routed_experts: ``(tokens, layers, K)`` with tokens = B * L in (B, L) order, or ``(B, L, layers, K)``;
            of the latter each sample may lack its last row: the last token was never routed.
        layers: the model's MoE layers.
        columns: which entry of dim ``layers`` belongs to each of them; None: as many as there are, in order.
        valid_BL: bool, False for padding, which may miss any ids; elsewhere a sample may end with at most one
            row that is missing as a whole.

    Raises:
        ReplayDataError: a wrong dtype or shape, an id outside [-1, E), the same id twice in a row, a layer
            of zeros only, or more than one trailing row without ids.
    """
    if routed_experts.dtype not in _DTYPES:
        raise ReplayDataError(f"routed_experts is {routed_experts.dtype}, not int8, int16, int32 or int64")
    ids_BLCK = _by_sample(routed_experts.detach().cpu(), batch_size, seq_len)
    there = ids_BLCK.shape[2]
    columns = list(range(there)) if columns is None else list(columns)
    if len(columns) != len(layers) or any(not 0 <= column < there for column in columns):
        raise ReplayDataError(
            f"routed_experts has {there} layers, the model has {len(layers)} MoE layers; say with columns "
            "which entry belongs to which"
        )
    ids_BLCK = ids_BLCK[:, :, columns]
    valid_BL = torch.ones(batch_size, seq_len, dtype=torch.bool) if valid_BL is None else valid_BL.cpu()
    if valid_BL.dtype != torch.bool or valid_BL.shape != (batch_size, seq_len):
        raise ReplayDataError(
            f"valid_BL is {valid_BL.dtype} of shape {tuple(valid_BL.shape)}; it must be torch.bool of shape "
            f"(B, L) = ({batch_size}, {seq_len})"
        )
    for number, layer in enumerate(layers):
        # Wide: a comparison with E would wrap E around to the ids' own dtype.
        check_layer(ids_BLCK[:, :, number].long(), layer, valid_BL)
    dtype = narrowest_dtype(max((layer.num_experts for layer in layers), default=1))
    return ids_BLCK.flatten(0, 1).to(dtype).contiguous()


def _by_sample(ids: torch.Tensor, batch_size: int, seq_len: int) -> torch.Tensor:
    shape = tuple(ids.shape)
    if ids.dim() == 3 and shape[0] == batch_size * seq_len:
        return ids.unflatten(0, (batch_size, seq_len))
    if ids.dim() == 4 and shape[0] == batch_size and shape[1] in (seq_len, seq_len - 1):
        if shape[1] == seq_len:
            return ids
        return torch.cat([ids, ids.new_full((batch_size, 1, *shape[2:]), MISSING)], dim=1)
    raise ReplayDataError(
        f"routed_experts has shape {shape}; it must be "
        f"(B * L, layers, K) = ({batch_size * seq_len}, layers, K) "
        f"or (B, L or L - 1, layers, K) = ({batch_size}, {seq_len} or {seq_len - 1}, layers, K)"
    )


def check_layer(
    ids_BLK: torch.Tensor, layer: LayerShape, valid_BL: torch.Tensor, *, captured: bool = True
) -> None:
    """Raises ReplayDataError for what ``ingest`` refuses in a layer's int64 ids.

    Args:
        captured: whether zeros may be an engine's empty buffer; our own records are what they are.
    """
    if ids_BLK.shape[2] != layer.top_k:
        raise ReplayDataError(f"{layer.name}: K is {ids_BLK.shape[2]}, the layer's is {layer.top_k}")
    present_BN = (ids_BLK != MISSING).flatten(1)
    zeros_B = ((ids_BLK == 0).flatten(1) == present_BN).all(1) & (present_BN.sum(1) > 1)
    if layer.top_k == 1:  # one sample may well go to expert 0 throughout; all of them hardly
        zeros_B &= zeros_B.all()
    if captured and layer.num_experts > 1 and zeros_B.any():
        sample = int(zeros_B.nonzero()[0])
        raise ReplayDataError(f"{layer.name}, sample {sample}: every id is 0; the layer was not captured")
    outside_BLK = (ids_BLK < MISSING) | (ids_BLK >= layer.num_experts)
    _refuse(outside_BLK.any(2), ids_BLK, layer, f"has an id outside [-1, {layer.num_experts})")
    ordered_BLK = ids_BLK.sort(dim=2).values
    twice_BLK = (ordered_BLK[..., 1:] == ordered_BLK[..., :-1]) & (ordered_BLK[..., 1:] != MISSING)
    _refuse(twice_BLK.any(2), ids_BLK, layer, "has the same id twice")
    without_BL = (ids_BLK == MISSING).all(2) & valid_BL
    trailing_BL = _trailing(without_BL, valid_BL)
    _refuse(trailing_BL, ids_BLK, layer, "is one of several trailing tokens without ids")


def _trailing(without_BL: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
    """Rows of a missing tail of two or more valid tokens."""
    run_BL = (without_BL | ~valid_BL).flip(1).long().cumprod(1).flip(1).bool() & without_BL
    return run_BL & (run_BL.sum(1, keepdim=True) > 1)


def _refuse(bad_BL: torch.Tensor, ids_BLK: torch.Tensor, layer: LayerShape, what: str) -> None:
    if bad_BL.any():
        sample, token = map(int, bad_BL.nonzero()[0])
        row = ids_BLK[sample, token].tolist()
        raise ReplayDataError(f"{layer.name}, sample {sample}, token {token}: {row} {what}")


def fill_missing(ids_TK: torch.Tensor, ranking_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``ids_TK`` without MISSING, and which picks were filled. No row gets an id twice, no value moves.

    Each row's missing picks take, from left to right, the best experts of ``ranking_TE`` that the row does
    not have yet: equal ones by id, NaN and -inf last, so that there are always enough (LLM360/miles#11,
    whose ranking lets -inf tie with the experts already taken).

    Args:
        ids_TK: int64, K <= E; present ids differ within a row.
        ranking_TE: any float; E columns.
    """
    missing_TK = ids_TK == MISSING
    num_experts = ranking_TE.shape[1]
    order_TE = (
        ranking_TE.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        .sort(dim=1, descending=True, stable=True)
        .indices
    )
    taken_TE = torch.zeros(*ids_TK.shape[:1], num_experts + 1, dtype=torch.bool, device=ids_TK.device)
    taken_TE = taken_TE.scatter_(1, torch.where(missing_TK, num_experts, ids_TK), True)[:, :num_experts]
    # Stable: experts that are free come first, in the order of the ranking.
    free_first_TE = taken_TE.gather(1, order_TE).to(torch.uint8).sort(dim=1, stable=True).indices
    free_TE = order_TE.gather(1, free_first_TE)
    place_TK = (missing_TK.cumsum(1) - 1).clamp(min=0)
    return torch.where(missing_TK, free_TE.gather(1, place_TK), ids_TK), missing_TK


def balanced_ranking(tokens_T: torch.Tensor, num_experts: int, top_k: int, ep_size: int) -> torch.Tensor:
    """``(T, E)`` float32: experts in turn over the EP ranks, each token starting where the one before ended.

    Args:
        tokens_T: int64 global token indices: the same fill on any mesh of the same EP degree.
    """
    experts_E = torch.arange(num_experts, device=tokens_T.device)
    owners = Ownership(num_experts, ep_size)
    turn_E = owners.local_id_of(experts_E) * ep_size + owners.rank_of(experts_E)
    return -((turn_E - (tokens_T * top_k).unsqueeze(1)) % num_experts).float()
