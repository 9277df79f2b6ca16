"""Training text without a network, packed the same on every mesh: Python's own sources, or local files."""

from titan_moe.trainer.data.bpe import TOKENIZER_DIR
from titan_moe.trainer.data.corpus import DataError
from titan_moe.trainer.data.loader import TextDataLoader

__all__ = ["TOKENIZER_DIR", "DataError", "TextDataLoader"]
