"""One global stream of packed sequences, of which each rank takes its share.

A document of n tokens (bos, text, eos) gives n - 1 pairs (input, label), shifted inside the document as
torchtitan's loaders do: eos is only ever predicted, bos only ever read, no label crosses into the next
document, and no label is masked. The pairs of all documents follow each other without gaps; sequence j of the
stream is pairs [j*L, (j+1)*L). Letters: B local batch, L sequence length, W data-parallel ranks, r this one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchtitan.components.tokenizer import BaseTokenizer

from titan_moe.trainer.data.corpus import Corpus, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """The next pair to read, as an address in the stream: the same on every rank and every mesh."""

    epoch: int = 0
    document: int = 0  # rank in the epoch's order, not the corpus index
    token: int = 0  # pairs of that document already read
    sequence: int = 0  # sequences already read, over all epochs

    def as_dict(self) -> dict[str, int]:
        """Returns the four numbers by name."""
        return asdict(self)


class LocalBatch(NamedTuple):
    """What one rank trains on, and where the stream stands once every rank has its share."""

    inputs: dict[str, torch.Tensor]  # "input" and "positions", (B, L) int64 each
    labels_BL: torch.Tensor  # (B, L) int64
    cursor: dict[str, int]  # plain ints: they cross process borders and pin_memory untouched


class _EndOfText(Exception):
    """A finite stream has no further pair."""


class _Pairs(NamedTuple):
    ids: torch.Tensor  # k + 1 tokens for k pairs
    starts_document: bool


class _Reader:
    """Walks the documents from a cursor, tokenizing one at a time and keeping only the current one."""

    def __init__(self, stream: "PackedStream", cursor: Cursor) -> None:
        self.stream = stream
        self.epoch, self.document, self.token = cursor.epoch, cursor.document, cursor.token
        self._open_epoch()
        self._open_document()
        if self.token > self.num_pairs:
            raise DataError(
                f"dataloader.token ({self.token}) in the saved state is past the end of its document "
                f"({self.num_pairs}): the corpus has changed since the checkpoint was written"
            )

    def take(self, num_pairs: int) -> list[_Pairs]:
        """Returns the next ``num_pairs`` pairs as views of their documents; _EndOfText if there are fewer."""
        pieces = []
        while num_pairs:
            self._skip_finished_documents()
            count = min(num_pairs, self.num_pairs - self.token)
            pieces.append(_Pairs(self.ids[self.token : self.token + count + 1], self.token == 0))
            self.token += count
            num_pairs -= count
        return pieces

    def _skip_finished_documents(self) -> None:
        for _ in range(len(self.order) + 1):
            if self.token < self.num_pairs:
                return
            self._next_document()
        raise DataError("no document of the corpus gives a pair of tokens: there is nothing to train on")

    def _next_document(self) -> None:
        if self.document + 1 < len(self.order):
            self.document += 1
        elif self.stream.infinite:
            self.epoch, self.document = self.epoch + 1, 0
            self._open_epoch()
        else:
            raise _EndOfText
        self.token = 0
        self._open_document()

    def _open_epoch(self) -> None:
        self.order = self.stream.corpus.order(seed=self.stream.seed, epoch=self.epoch)

    def _open_document(self) -> None:
        text = self.stream.corpus.read(self.order[self.document])
        self.ids = torch.tensor(
            self.stream.tokenizer.encode(text, add_bos=True, add_eos=True), dtype=torch.int64
        )
        self.num_pairs = max(len(self.ids) - 1, 0)


class PackedStream(IterableDataset):
    """Iterates over one rank's local batches, from ``start`` on.

    Local batch m of rank r (counted from ``start``) holds sequences m*B*W + r*B ... + B-1: the W ranks read
    B*W consecutive sequences, and A local batches of each the same A*B*W, whatever W, B and A are. A rank
    tokenizes what it skips: that is the price of a stream that does not depend on the mesh. With n loader
    workers, worker w yields the m with m % n == w, which is the order the loader asks them in.

    A finite stream ends before the first group of B*W sequences that the epoch cannot fill, on every rank.

    Args:
        corpus: The documents.
        tokenizer: Encodes a document with ``add_bos=True, add_eos=True``.
        seq_len: L.
        local_batch_size: B.
        dp_rank: r, in [0, W).
        dp_world_size: W.
        seed: Of the document order; with the epoch, it decides it.
        infinite: Continue with the next epoch's order, without a gap, instead of ending.

    Raises:
        DataError: While iterating: a document cannot be read, the corpus gives no pair, or a finite one is
            too small for a single group.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: BaseTokenizer,
        *,
        seq_len: int,
        local_batch_size: int,
        dp_rank: int,
        dp_world_size: int,
        seed: int,
        infinite: bool,
    ) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.seq_len, self.local_batch_size = seq_len, local_batch_size
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.seed, self.infinite = seed, infinite
        self.start = Cursor()

    def __iter__(self) -> Iterator[LocalBatch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        reader = _Reader(self, self.start)
        own = self.local_batch_size * self.seq_len
        sequence = self.start.sequence
        for local_batch in itertools.count():
            try:  # the whole group is read before any of it is given out: all ranks end at the same one
                reader.take(own * self.dp_rank)
                pieces = reader.take(own)
                reader.take(own * (self.dp_world_size - 1 - self.dp_rank))
            except _EndOfText:
                if not sequence:
                    raise DataError(self._too_small()) from None
                return
            sequence += self.local_batch_size * self.dp_world_size
            if local_batch % num_workers == worker:
                cursor = Cursor(
                    epoch=reader.epoch, document=reader.document, token=reader.token, sequence=sequence
                )
                yield self._pack(pieces, cursor)

    def _pack(self, pieces: list[_Pairs], cursor: Cursor) -> LocalBatch:
        shape = (self.local_batch_size, self.seq_len)
        input_BL = torch.cat([piece.ids[:-1] for piece in pieces]).view(shape)
        labels_BL = torch.cat([piece.ids[1:] for piece in pieces]).view(shape)
        starts_BL = torch.cat(
            [torch.arange(len(piece.ids) - 1).eq(0) & piece.starts_document for piece in pieces]
        ).view(shape)
        # A document continued from the sequence before counts from 0 again: RoPE ends at seq_len.
        index_L = torch.arange(self.seq_len)
        last_start_BL = torch.where(starts_BL, index_L, 0).cummax(dim=1).values
        inputs = {"input": input_BL, "positions": index_L - last_start_BL}
        return LocalBatch(inputs, labels_BL, cursor.as_dict())

    def _too_small(self) -> str:
        return (
            f"the corpus ({len(self.corpus)} documents) does not fill one batch: {self.dp_world_size} ranks "
            f"x {self.local_batch_size} sequences x {self.seq_len} tokens, and dataloader.infinite is false: "
            "use more text, a smaller batch or a shorter sequence"
        )
