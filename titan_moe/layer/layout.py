"""Where a rank's tokens lie in the (B, L) grid. The shape legend is in ``titan_moe/layer/moe.py``."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The local sizes of one rank, and its place among the SP ranks that share the sequence.

    The sequence is split over the SP ranks as ``torch.chunk`` splits it. With
    ``padded = local_seq_len_after_padding``, rank r has the positions from ``r * padded`` up to, and without,
    ``min((r + 1) * padded, global_seq_len)``. So late ranks may have fewer than that, or none. Padding is a
    number here, never a row ("virtual padding", pytorch/torchtitan#3577).

    Raises:
        ValueError: the numbers do not describe such a split.
    """

    local_batch_size: int  # B on this rank
    local_seq_len: int  # L on this rank, real tokens only
    dim: int  # D
    global_seq_len: int  # L before SP
    sp_rank: int = 0
    sp_size: int = 1

    def __post_init__(self) -> None:
        if any(isinstance(value, torch.SymInt) for value in (self.sp_rank, self.local_seq_len)):
            return  # traced or simulated ranks: a comparison would ask for one answer for all of them
        if not 0 <= self.sp_rank < self.sp_size:
            raise ValueError(
                f"sp_rank ({self.sp_rank}) must be in [0, sp_size) with sp_size ({self.sp_size})"
            )
        padded = self.local_seq_len_after_padding
        own = min(max(self.global_seq_len - self.sp_rank * padded, 0), padded)
        if self.local_seq_len != own:
            raise ValueError(
                f"local_seq_len ({self.local_seq_len}) must be {own}: rank {self.sp_rank} of {self.sp_size} "
                f"holds that many of global_seq_len ({self.global_seq_len}) in torch.chunk order"
            )

    @property
    def local_seq_len_after_padding(self) -> int:
        """``ceil(global_seq_len / sp_size)``: the same on all SP ranks."""
        return -(-self.global_seq_len // self.sp_size)

    @property
    def num_local_tokens_after_padding(self) -> int:
        """B times the padded length: what buffers of a fixed size are sized by."""
        return self.local_batch_size * self.local_seq_len_after_padding

    @property
    def num_local_tokens(self) -> int:
        """T: the real tokens on this rank."""
        return self.local_batch_size * self.local_seq_len

    @property
    def local_shape(self) -> tuple[int, int, int]:
        """(B, L, D) on this rank."""
        return (self.local_batch_size, self.local_seq_len, self.dim)

    @property
    def global_shape(self) -> tuple[int, int, int]:
        """(B, L, D) over all SP ranks; B stays this data-parallel rank's own."""
        return (self.local_batch_size, self.global_seq_len, self.dim)

    def global_token_indices(self, device: torch.device | str | None = None) -> torch.Tensor:
        """``(T,)`` int64: the place of each local token in the flattened (B, global L) grid.

        It is ``b * global_seq_len + sp_rank * local_seq_len_after_padding + l``. A flat offset per rank is
        right for B == 1 only (pytorch/torchtitan#3604).
        """
        rows_B1 = torch.arange(self.local_batch_size, device=device).unsqueeze(1) * self.global_seq_len
        cols_1L = torch.arange(self.local_seq_len, device=device).unsqueeze(0)
        first = self.sp_rank * self.local_seq_len_after_padding
        return (rows_B1 + cols_1L + first).reshape(-1)
