"""Documents to train on: the Python standard library's sources, or local text and JSONL files.

A corpus is an indexed list of documents plus, for every epoch, the order in which to read them. Both are
pure functions of what is on disk and of ``(seed, epoch)``: no rank, mesh or worker enters into them, which is
what lets every rank walk the same stream.
"""

import functools
import glob
import hashlib
import json
import os
import platform
import random
import sysconfig
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

_SKIPPED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_SKIPPED_FILES = frozenset({"sitecustomize.py", "usercustomize.py"})
_PASSAGE_BYTES = 1024  # a source file is 20 KB on average: whole ones would fill several small batches each
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")  # written by configure: they differ between two machines


class DataError(ValueError):
    """A corpus, a data file or a saved data position that cannot be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class TextFile:
    """A whole file as one document; bytes that are not UTF-8 become U+FFFD."""

    name: str
    path: Path
    size: int

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> str:
        """Returns the file's text; ``index`` is always 0."""
        return self.path.read_bytes().decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class PassageFile:
    """A text file as consecutive passages, each a document: whole lines, about ``passage_bytes`` of them."""

    name: str
    path: Path
    size: int
    starts: tuple[int, ...]  # byte offset of each passage, the file's size at the end

    @classmethod
    def of(cls, name: str, path: Path, passage_bytes: int) -> "PassageFile":
        """Cuts the file at the first line end after every ``passage_bytes``."""
        raw, starts = path.read_bytes(), [0]
        while len(raw) - starts[-1] > passage_bytes:
            line_end = raw.find(b"\n", starts[-1] + passage_bytes)
            if line_end < 0 or line_end + 1 == len(raw):
                break
            starts.append(line_end + 1)
        return cls(name, path, len(raw), (*starts, len(raw)))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def read(self, index: int) -> str:
        """Returns the text of passage ``index``; bytes that are not UTF-8 become U+FFFD."""
        raw = self.path.read_bytes()[self.starts[index] : self.starts[index + 1]]
        return raw.decode("utf-8", errors="replace")


@dataclass(frozen=True, slots=True)
class JsonlFile:
    """A JSONL file as one document per non-blank line: the string under ``text_key``."""

    name: str
    path: Path
    size: int
    text_key: str
    starts: array  # byte offset of each document's line
    lengths: array  # bytes of each document's line, without the newline

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> str:
        """Returns document ``index``; raises DataError where the file has changed since it was indexed."""
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            raw = file.read(self.lengths[index])
        where = f"{self.path} (document {index}, indexed at byte {self.starts[index]})"
        return _json_text(raw, where=where, text_key=self.text_key)


DocumentFile = TextFile | PassageFile | JsonlFile
"""One file of a corpus, holding ``len(file)`` documents."""


def _json_text(raw: bytes, *, where: str, text_key: str) -> str:
    try:
        record = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{where}: not a line of UTF-8 JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    text = record.get(text_key)
    if not isinstance(text, str):
        found = f"{type(text).__name__}" if text_key in record else f"only {sorted(record)}"
        raise DataError(f"{where}: dataloader.text_key {text_key!r} must hold a string, found {found}")
    try:
        text.encode("utf-8")  # "\ud800" is legal JSON, but no tokenizer can take a lone surrogate
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text_key!r} is not valid Unicode text ({error.reason})") from None
    return text


@functools.lru_cache(maxsize=64)
def _index_jsonl(path: Path, size: int, mtime_ns: int, text_key: str) -> tuple[array, array]:
    """Checks every line now: a bad one must not stop a run later. Cached: a validator reopens its files."""
    starts, lengths, offset = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                _json_text(line, where=f"{path}:{number}", text_key=text_key)
                starts.append(offset)
                lengths.append(len(line.rstrip(b"\r\n")))
            offset += len(line)
    return starts, lengths


class Corpus:
    """An indexed list of documents with a seeded order per epoch.

    Args:
        files: The files in corpus order; document i of the corpus is the i-th when they are read in turn.
        label: Human-readable head of ``fingerprint``.

    Raises:
        DataError: There is no document at all.
    """

    def __init__(self, files: Sequence[DocumentFile], *, label: str) -> None:
        self.files = list(files)
        self._ends = list(accumulate(len(file) for file in self.files))
        if not len(self):
            raise DataError(f"the corpus ({label}) holds no document")
        digest = hashlib.sha256()
        for file in self.files:
            key = file.text_key if isinstance(file, JsonlFile) else None
            digest.update(repr((file.name, file.size, len(file), key)).encode())
        self.fingerprint = f"{label}:{digest.hexdigest()[:16]}"
        """Names, sizes and document counts of the files in order (not their contents, which may be huge)."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> str:
        """Returns the text of document ``index``, 0 <= index < len(self)."""
        part = bisect_right(self._ends, index)
        return self.files[part].read(index - (self._ends[part] - len(self.files[part])))

    def order(self, *, seed: int, epoch: int) -> list[int]:
        """Returns every document index once, shuffled as a pure function of ``(seed, epoch)``."""
        # random() is the one method whose sequence Python promises to keep for a seed; shuffle() is not.
        # A key, no import: another name would silently change the order of every resumed run.
        generator = random.Random(f"titan_moe.data:{seed}:{epoch}")
        keys = [generator.random() for _ in range(len(self))]
        return sorted(range(len(self)), key=keys.__getitem__)


def stdlib_corpus() -> Corpus:
    """Returns the standard library's ``.py`` files in passages, sorted by relative POSIX path.

    Left out: third-party packages, tests (distributors ship them or not) and files generated per platform.
    The text still belongs to one Python release: two releases have two corpora, and two fingerprints.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[DocumentFile] = []
    for folder, dirs, names in os.walk(root):
        dirs[:] = [d for d in dirs if d not in _SKIPPED_DIRS and not d.startswith(_GENERATED_PREFIXES)]
        for name in names:
            if (
                name.endswith(".py")
                and name not in _SKIPPED_FILES
                and not name.startswith(_GENERATED_PREFIXES)
            ):
                path = Path(folder, name)
                files.append(PassageFile.of(path.relative_to(root).as_posix(), path, _PASSAGE_BYTES))
    files.sort(key=lambda file: file.name)
    return Corpus(files, label=f"python-{platform.python_version()}-stdlib")


def files_corpus(paths: Sequence[str], *, text_key: str = "text") -> Corpus:
    """Returns local files as a corpus, in the order of ``paths`` and sorted inside each glob, each file once.

    Args:
        paths: Files or globs (``**`` recurses, ``~`` expands, relative to the working directory). A name
            ending in ``.jsonl`` is read line by line; anything else is one document of text.
        text_key: The key of a JSONL line's text.

    Raises:
        DataError: A path matches no file, a file is binary, a JSONL line is unusable, or nothing is left.
    """
    found: dict[Path, DocumentFile] = {}
    for pattern in paths:
        expanded = os.path.expanduser(pattern)
        # A file whose own name holds [ or * is taken as itself.
        matches = [expanded] if os.path.isfile(expanded) else sorted(glob.glob(expanded, recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            hint = (
                "; it is a folder: name its files, as in 'folder/**/*.txt'" if os.path.isdir(expanded) else ""
            )
            raise DataError(f"dataloader.paths: {pattern!r} matches no file under {os.getcwd()}{hint}")
        for path in files:
            if path.resolve() not in found:
                found[path.resolve()] = _open_file(path, text_key)
    return Corpus(list(found.values()), label="files")


def _open_file(path: Path, text_key: str) -> DocumentFile:
    stat = path.stat()
    if path.suffix == ".jsonl":
        starts, lengths = _index_jsonl(path, stat.st_size, stat.st_mtime_ns, text_key)
        return JsonlFile(path.name, path, stat.st_size, text_key, starts, lengths)
    with path.open("rb") as file:
        if b"\0" in file.read(8192):
            raise DataError(
                f"dataloader.paths: {path} is binary (compressed? parquet?), expected text or .jsonl"
            )
    return TextFile(path.name, path, stat.st_size)
