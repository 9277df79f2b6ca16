"""The shipped tokenizer: a 2,048-entry byte-level BPE of the Python standard library, rebuilt byte for byte.

Training is deterministic, so the same text and the same ``tokenizers`` release give the same file. The text
belongs to one Python release; ``manifest.json`` records which, with its sha256, so that "another tokenizer"
and "another standard library" are told apart.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titan_moe.trainer.data.corpus import Corpus, DataError, stdlib_corpus

TOKENIZER_DIR: Path = Path(__file__).parent / "tokenizer"
"""Folder of the shipped tokenizer: the ``tokenizer_path`` of ``HuggingFaceTokenizer``."""

VOCAB_SIZE = 2048  # special tokens included
BOS_TOKEN = "<|begin_of_text|>"  # id 0
EOS_TOKEN = "<|end_of_text|>"  # id 1
REBUILD_COMMAND = "python -m titan_moe data build-tokenizer"

IDENTICAL, DIFFERENT, OTHER_CORPUS = 0, 1, 3
"""Exit codes of a check."""


def training_digest(corpus: Corpus) -> str:
    """Returns the sha256 of a corpus: the lengths and texts of its documents, in corpus order."""
    digest = hashlib.sha256()
    for index in range(len(corpus)):
        text = corpus.read(index).encode("utf-8")
        digest.update(f"{len(text)}\0".encode())
        digest.update(text)
    return digest.hexdigest()


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Returns a byte-level BPE of exactly ``VOCAB_SIZE`` entries.

    Any UTF-8 text round-trips through it, unless it spells out a special token: that becomes the token.

    Raises:
        DataError: The corpus is too small to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: nothing is ever unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator((corpus.read(index) for index in range(len(corpus))), trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise DataError(f"the corpus fills {tokenizer.get_vocab_size()} vocabulary entries of {VOCAB_SIZE}")
    return tokenizer


def build_assets(corpus: Corpus) -> dict[str, bytes]:
    """Trains and returns the tokenizer folder, file name to content."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "add_bos_token": False,  # the loader asks for both by itself; a plain encode() stays plain
        "add_eos_token": False,
    }
    assets = {"tokenizer.json": _as_json(json.loads(train_tokenizer(corpus).to_str()), indent=None)}
    assets["tokenizer_config.json"] = _as_json(config, indent=2)
    manifest = {
        "command": REBUILD_COMMAND,
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "training_files": len(corpus.files),
        "training_sha256": training_digest(corpus),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in assets.items()},
    }
    return assets | {"manifest.json": _as_json(manifest, indent=2)}


def _as_json(value: Any, *, indent: int | None) -> bytes:
    return (json.dumps(value, ensure_ascii=True, indent=indent) + "\n").encode("ascii")


def read_manifest(folder: Path = TOKENIZER_DIR) -> dict[str, Any]:
    """Returns ``manifest.json`` of a tokenizer folder; raises DataError where there is none."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no tokenizer manifest ({error})") from None


def check_tokenizer(folder: Path = TOKENIZER_DIR) -> tuple[int, str]:
    """Rebuilds in memory and compares with ``folder``.

    Returns:
        ``(exit code, one line)``: IDENTICAL; OTHER_CORPUS where this Python's standard library is not the one
        recorded, so that nothing can be said; DIFFERENT where the text is the same and the files are not.
    """
    recorded, corpus = read_manifest(folder), stdlib_corpus()
    digest = training_digest(corpus)
    if digest != recorded["training_sha256"]:
        return OTHER_CORPUS, (
            f"corpora differ: recorded Python {recorded['python']} ({recorded['training_sha256'][:12]}), "
            f"here Python {platform.python_version()} ({digest[:12]}); check under the recorded version"
        )
    assets = build_assets(corpus)
    changed = [name for name in recorded["sha256"] if not _same(folder / name, assets[name])]
    if changed:
        return DIFFERENT, (
            f"different: {', '.join(changed)} (recorded with tokenizers {recorded['tokenizers']}, "
            f"rebuilt with {tokenizers.__version__})"
        )
    return IDENTICAL, f"identical: {folder} (Python {recorded['python']}, sha256 {digest[:12]})"


def _same(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def write_tokenizer(folder: Path | None = None) -> tuple[int, str]:
    """Builds the tokenizer and writes its folder.

    Args:
        folder: Where to write. None rewrites the shipped folder, and only from the recorded text: an
            unnoticed new vocabulary would change every run.

    Returns:
        ``(exit code, one line)``: 0, or OTHER_CORPUS where nothing was written.
    """
    corpus, here = stdlib_corpus(), platform.python_version()
    if folder is None and training_digest(corpus) != (recorded := read_manifest())["training_sha256"]:
        return OTHER_CORPUS, (
            f"corpora differ: the shipped tokenizer is of Python {recorded['python']}, this is {here} with "
            "other sources; give --out DIR to build another one"
        )
    folder = folder or TOKENIZER_DIR
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in build_assets(corpus).items():
        (folder / name).write_bytes(content)
    files = len(corpus.files)
    return IDENTICAL, f"wrote {VOCAB_SIZE} entries to {folder} from {files} files of Python {here}"
