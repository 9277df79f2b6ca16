"""The training loader: torchtitan's loader class over the packed stream, with a state that no mesh enters."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer

from titan_moe.trainer.data.corpus import Corpus, DataError, files_corpus, stdlib_corpus
from titan_moe.trainer.data.packing import Cursor, LocalBatch, PackedStream

_STATE_FORMAT = 1
_REMEDY = '; to start the stream anew, set checkpoint.exclude_from_loading = ["dataloader"]'
_CURSOR_KEYS = tuple(f.name for f in fields(Cursor))
_TOKENIZER_PROBE = "".join(map(chr, range(32, 127))) + (
    '\n\tdef __init__(self, value=None):\r\n        """Return 3.14 or the naïve Ωmega 漢字 🙂."""\n' * 2
)


class TextDataLoader(ParallelAwareDataloader):
    """Packed text on any mesh: the standard library's sources, or local text and JSONL files.

    Yields ``({"input": (B, L) int64, "positions": (B, L) int64}, labels (B, L) int64)``. Sequence i of global
    batch n is the same text whatever the data-parallel degree, the local batch size, the accumulation steps
    and the number of workers (see ``PackedStream``). ``positions`` restart at 0 at each document start and at
    each sequence start; no label is masked.

    ``iter()`` continues from where ``state_dict()`` says the loader stands: at the beginning, after the last
    batch that was delivered (what workers had prepared beyond it is read again), or where ``load_state_dict``
    put it. An exhausted finite loader stays exhausted.

    Args:
        config: The ``[dataloader]`` section.
        dp_world_size: Data-parallel ranks that share the stream.
        dp_rank: This one, in [0, dp_world_size).
        tokenizer: Its fingerprint is part of the state.
        seq_len: L.
        local_batch_size: B, sequences per batch of this rank.
        snapshot_every_n_steps: Accepted for torchtitan's trainer. The state is exact after every batch.

    Raises:
        DataError: The corpus is empty or one of its files is unusable.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        source: Literal["stdlib", "files"] = "stdlib"
        """Python's own sources (no network needed), or local files."""

        paths: list[str] = field(default_factory=list)
        """Files or globs for source = "files": .jsonl line by line, anything else as one document of text."""

        text_key: str = "text"
        """Key of a JSONL line's text."""

        seed: int = 0
        """Of the document order."""

        infinite: bool = True
        """Start the next epoch, reshuffled, at the end of the corpus; false ends the stream (validation)."""

        def __post_init__(self) -> None:
            if self.source not in ("stdlib", "files"):
                raise DataError(f'dataloader.source ({self.source!r}) must be "stdlib" or "files"')
            if self.source == "files" and not self.paths:
                raise DataError(
                    'dataloader.source = "files" needs dataloader.paths: a list of files or globs'
                )
            if self.source == "stdlib" and self.paths:
                raise DataError(
                    f'dataloader.paths ({self.paths}) is read only with dataloader.source = "files"'
                )
            if self.dataset or self.dataset_path:
                raise DataError(
                    f"dataloader.dataset ({self.dataset!r}) and dataset_path ({self.dataset_path!r}) belong "
                    "to torchtitan's Hugging Face loader; local files go into dataloader.paths"
                )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        corpus = _open_corpus(config)
        stream = PackedStream(
            corpus,
            tokenizer,
            seq_len=seq_len,
            local_batch_size=local_batch_size,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            seed=config.seed,
            infinite=config.infinite,
        )
        super().__init__(
            stream,
            dp_rank,
            dp_world_size,
            batch_size=None,  # the stream yields whole local batches
            collate_fn=_as_is,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )
        self._stream, self._cursor = stream, Cursor()
        self._identity = {
            "format": _STATE_FORMAT,
            "source": config.source,
            "corpus": corpus.fingerprint,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "seed": config.seed,
            "seq_len": seq_len,
        }

    # pyrefly: ignore [bad-override]  # torchdata promises its own iterator class, BaseDataLoader this one
    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Yields batches from the current position on."""
        self._stream.start = self._cursor
        StatefulDataLoader.load_state_dict(self, {})  # drops workers that hold an older start
        for batch in super().__iter__():
            # The position rides with its batch: exact however many batches the workers are ahead.
            self._cursor = Cursor(**batch.cursor)
            yield batch.inputs, batch.labels_BL

    def state_dict(self) -> dict[str, Any]:
        """Returns plain ints and strings, equal on all ranks: which stream, and the next pair's place."""
        return self._identity | self._cursor.as_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Moves to a saved position; mesh, local batch size and workers may differ from the saving run's.

        Takes effect at the next ``iter()``.

        Raises:
            DataError: Keys are missing (another loader's state, or a truncated one), or the saved stream is
                not this one; the message names each difference. The loader is then unchanged.
        """
        missing = [key for key in (*self._identity, *_CURSOR_KEYS) if key not in state_dict]
        if missing:
            raise DataError(
                f"dataloader state has no {', '.join(missing)}: it is truncated, or another loader wrote it "
                f"(it has {', '.join(map(str, state_dict)) or 'nothing'}){_REMEDY}"
            )
        differing = [
            f"{key} is {state_dict[key]!r} in the checkpoint, {value!r} here"
            for key, value in self._identity.items()
            if state_dict[key] != value
        ]
        if differing:
            raise DataError(f"dataloader state is of another stream: {'; '.join(differing)}{_REMEDY}")
        position = {key: state_dict[key] for key in _CURSOR_KEYS}
        whole = all(type(value) is int and value >= 0 for value in position.values())
        if not whole or position["document"] >= len(self._stream.corpus):
            raise DataError(f"dataloader state is corrupt: {position} is no place in this corpus{_REMEDY}")
        self._cursor = Cursor(**position)


def tokenizer_fingerprint(tokenizer: BaseTokenizer) -> str:
    """Returns a hash of the vocabulary size and of how the tokenizer encodes a fixed text."""
    ids = tokenizer.encode(_TOKENIZER_PROBE, add_bos=True, add_eos=True)
    return hashlib.sha256(repr((tokenizer.get_vocab_size(), ids)).encode()).hexdigest()[:16]


def _open_corpus(config: TextDataLoader.Config) -> Corpus:
    if config.source == "stdlib":
        return stdlib_corpus()
    return files_corpus(config.paths, text_key=config.text_key)


def _as_is(batch: LocalBatch) -> LocalBatch:
    return batch
