"""The words of an error: what a wrong key may have meant, and which key a foreign message is about."""

import re
from typing import Any

from titan_moe.trainer.config.errors import nearest
from titan_moe.trainer.config.sections import ALTERNATIVES, every_key, keys_of
from titan_moe.trainer.config.toml import Given, Settings, Text, leaves


def key_hint(path: str, name: str, known: Any) -> str:
    """The nearest key of ``[path]``; else the variant or the sections where this very key exists."""
    close = nearest(name, known)
    if close:
        return close
    exact = [section for section, key in every_key() if key == name]
    if path in exact and path in ALTERNATIVES:
        choice = ALTERNATIVES[path]
        fitting = [o for o, cls in choice.options.items() if cls is not None and name in keys_of(cls)]
        return f"; it belongs to {choice.key} = {' or '.join(map(repr, fitting))}"
    elsewhere = sorted({f"{section}.{name}" if section else name for section in exact})
    return f"; did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""


def unknown_at_top(name: str, value: Any, known: Any) -> str:
    """What to say of a section, or a key outside sections, that does not exist."""
    what, hint = "key", key_hint("", name, known)
    if isinstance(value, dict):
        what, hint = "section", nearest(name, known)
        for key, _ in leaves(value):
            hint = hint or key_hint("", key, ())
    return f"is not a {what}{hint or ' (there are: ' + ', '.join(known) + ')'}"


def guilty_keys(settings: Settings, path: str, message: str) -> dict[str, Given]:
    """The keys that torchtitan's prose about ``[path]`` means: those it names, else all set there."""
    prose = f"_{re.sub(r'[^a-z0-9_]', '_', message.lower())}_"
    written = dict(leaves(settings.table(path), f"{path}." if path else ""))
    named = {
        key: leaf
        for key, leaf in written.items()
        if f"_{key.rpartition('.')[2]}_" in prose
        or (isinstance(leaf.value, str) and f"_{leaf.value}_" in prose)  # 'memory_budget' is a value
    }
    return named or (written if path else {})


def shown(value: Any) -> str:
    """A value of the wrong type, with its type where that is what is wrong."""
    if isinstance(value, str) and not isinstance(value, Text):
        return f"the string {value!r}"
    return repr(str(value)) if isinstance(value, Text) else written(value)


def written(value: Any) -> str:
    """A value as its author wrote it."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
