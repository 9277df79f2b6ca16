"""The one exception of this package, and its did-you-mean."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: origin, key, numbers, remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(word: str, words: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``words``, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
