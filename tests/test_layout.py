"""TokenLayout: where each rank's tokens sit, over every split of torch.chunk."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from titan_moe.layer.dispatch.base import DispatchMetadata
from titan_moe.layer.layout import TokenLayout

GRID = list(itertools.product((1, 2, 3), range(10), (1, 2, 3, 4)))  # B, L, sp_size


def split(batch: int, length: int, sp_size: int) -> list[TokenLayout]:
    """The layout of every SP rank, local lengths taken from torch.chunk itself."""
    chunks = list(torch.empty(batch, length, 8).chunk(sp_size, 1))
    chunks += [torch.empty(batch, 0, 8)] * (sp_size - len(chunks))
    return [
        TokenLayout(
            local_batch_size=batch,
            local_seq_len=chunk.shape[1],
            dim=8,
            global_seq_len=length,
            sp_rank=rank,
            sp_size=sp_size,
        )
        for rank, chunk in enumerate(chunks)
    ]


def flat_offset(layout: TokenLayout) -> Tensor:
    """pytorch/torchtitan#3604: what upstream had, one offset per rank."""
    return torch.arange(layout.num_local_tokens) + layout.sp_rank * layout.num_local_tokens


def disagreements(indices: Callable[[TokenLayout], Tensor]) -> list[tuple[int, int, int]]:
    """The (B, L, sp_size) where `indices` is not what torch.chunk does to a (B, L) grid of token numbers."""
    wrong = []
    for batch, length, sp_size in GRID:
        grid_BL = torch.arange(batch * length).view(batch, length)
        chunks = [*grid_BL.chunk(sp_size, 1), *[grid_BL[:, :0]] * sp_size]
        ranks = split(batch, length, sp_size)
        got = [indices(layout) for layout in ranks]
        right = all(torch.equal(g, c.flatten()) for g, c in zip(got, chunks, strict=False))
        if not right or torch.cat(got).sort().values.tolist() != list(range(batch * length)):
            wrong.append((batch, length, sp_size))
    return wrong


def test_indices_match_chunk_and_are_a_permutation() -> None:
    assert disagreements(TokenLayout.global_token_indices) == []


def test_a_flat_offset_is_wrong_from_two_sequences_on() -> None:
    # With B == 1 it is right wherever the ranks hold equally many tokens, and only there.
    even = [cell for cell in GRID if len({m.local_seq_len for m in split(*cell)}) == 1]
    wrong = set(disagreements(flat_offset))
    assert {cell for cell in even if cell[0] == 1}.isdisjoint(wrong)
    assert {cell for cell in even if cell[0] > 1 and cell[1] > 0 and cell[2] > 1} <= wrong


def test_hand_worked_example() -> None:
    """B=2, L=5 over 4 ranks is 2, 2, 1, 0 positions; P = ceil(5 / 4) = 2.

    token numbers b * 5 + position:      rank 0  rank 1  rank 2  rank 3
        b=0:   0 1 2 3 4                   0 1     2 3     4      -
        b=1:   5 6 7 8 9                   5 6     7 8     9      -
    """
    ranks = split(2, 5, 4)
    assert [m.local_seq_len for m in ranks] == [2, 2, 1, 0]
    assert [m.num_local_tokens for m in ranks] == [4, 4, 2, 0]
    assert [m.global_token_indices().tolist() for m in ranks] == [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9], []]
    assert {m.local_seq_len_after_padding for m in ranks} == {2}
    assert {m.num_local_tokens_after_padding for m in ranks} == {4}
    assert [m.local_shape for m in ranks] == [(2, 2, 8), (2, 2, 8), (2, 1, 8), (2, 0, 8)]
    assert {m.global_shape for m in ranks} == {(2, 5, 8)}


def test_indices_are_int64_on_the_device_asked_for() -> None:
    indices_T = split(2, 5, 4)[0].global_token_indices("meta")
    assert (indices_T.dtype, indices_T.device.type, indices_T.shape) == (torch.int64, "meta", (4,))


# Rank 2 of 4 of the example: B=2, L=1 here of 5, P=2.
RIGHT: dict[str, Any] = {
    "local_batch_size": 2,
    "local_seq_len": 1,
    "dim": 8,
    "global_seq_len": 5,
    "sp_rank": 2,
    "sp_size": 4,
}
WRONG = [
    ({"sp_rank": 4}, r"sp_rank \(4\) .* sp_size \(4\)"),
    ({"sp_rank": -1}, r"sp_rank \(-1\) .* sp_size \(4\)"),
    ({"sp_size": 2}, r"sp_rank \(2\) .* sp_size \(2\)"),
    ({"sp_size": 0}, r"sp_rank \(2\) .* sp_size \(0\)"),
    ({"global_seq_len": 9}, r"local_seq_len \(1\) must be 3: rank 2 of 4 .* global_seq_len \(9\)"),
    ({"local_seq_len": 2}, r"local_seq_len \(2\) must be 1: rank 2 of 4 .* global_seq_len \(5\)"),
    ({"local_seq_len": 0}, r"local_seq_len \(0\) must be 1: rank 2 of 4"),
    ({"sp_rank": 1}, r"local_seq_len \(1\) must be 2: rank 1 of 4"),
    ({"sp_rank": 3}, r"local_seq_len \(1\) must be 0: rank 3 of 4"),
]


class TestValidation:
    def test_the_right_numbers_pass(self) -> None:
        assert TokenLayout(**RIGHT) == split(2, 5, 4)[2]

    @pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(change) for change, _ in WRONG])
    def test_a_wrong_number_is_named_with_its_rule(self, change: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TokenLayout(**RIGHT | change)

    @pytest.mark.parametrize("name", RIGHT)
    def test_frozen(self, name: str) -> None:
        metadata = TokenLayout(**RIGHT)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(metadata, name, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt(DispatchMetadata):
    """A backend's own class."""

    order: str


class TestExtend:
    def test_keeps_every_number(self) -> None:
        layout = split(3, 7, 2)[1]
        receipt = Receipt.extend(layout, order="mine")
        assert receipt.order == "mine"
        assert vars(receipt) == vars(layout) | {"source": None, "order": "mine"}
        assert torch.equal(receipt.global_token_indices(), layout.global_token_indices())

    def test_is_frozen(self) -> None:
        receipt = Receipt.extend(split(1, 4, 2)[0], order="mine")
        with pytest.raises(dataclasses.FrozenInstanceError):
            receipt.order = "yours"  # type: ignore[misc]
