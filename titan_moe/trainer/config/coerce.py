"""One value against one type annotation: strict for TOML values, by the annotation for command-line text."""

import json
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from titan_moe.trainer.config.errors import nearest
from titan_moe.trainer.config.toml import Text

_SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", Path: "a path"}


class Mismatch(Exception):
    """The value is not of the type; ``str()`` says what would be, ``hint`` may name the nearest."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.hint = hint


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` wants it.

    An int is a float too; nothing else converts: 128.5 is not an int, "128" is not an int, 1 is not
    a bool. ``"none"`` is None where None is allowed, since TOML has no null. Lists become tuples
    where the annotation says so. Text is read as the annotation says, containers as a TOML or JSON literal.

    Raises:
        Mismatch: it is not; the text describes ``hint``.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        return _union(value, get_args(hint), hint)
    if get_origin(hint) is Literal:
        return _literal(value, hint)
    if isinstance(value, Text):
        value = _from_text(value, hint)
    if hint is Any:
        return value
    if hint is None or hint is types.NoneType:
        if value == "none":
            return None
        raise Mismatch(describe(hint))
    container = get_origin(hint) or hint
    if container in (list, tuple, dict):
        return _container(value, container, get_args(hint), hint)
    return _scalar(value, hint)


def describe(hint: Any) -> str:
    """``hint`` in the words of an error message."""
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return describe(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(arg) for arg in args))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if hint is None or hint is types.NoneType:
        return "'none'"
    if origin is list or (origin is tuple and Ellipsis in args):
        return f"a list, each item {describe(args[0])}" if args else "a list"
    if origin is tuple:
        return f"a list of {len(args)} ({', '.join(map(describe, args))})" if args else "a list"
    return "a table" if origin is dict else "a value"


def literal(text: str) -> Any:
    """``text`` as a TOML value, else as JSON.

    Raises:
        Mismatch: it is neither.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise Mismatch("a TOML or JSON literal") from None


def _scalar(value: Any, hint: Any) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and type(value) is str:
        return Path(value)
    if type(value) is not hint:  # not isinstance: True is an int to Python
        raise Mismatch(describe(hint))
    return value


def _from_text(text: Text, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), str(text))
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise Mismatch(describe(hint)) from None
    if hint is Any:
        try:
            return literal(text)
        except Mismatch:
            return str(text)
    if hint in (str, Path, None, types.NoneType):
        return str(text)
    try:
        return literal(text)
    except Mismatch:
        raise Mismatch(f"{describe(hint)}, written as a TOML or JSON literal") from None


def _union(value: Any, members: tuple[Any, ...], hint: Any) -> Any:
    # 'none' is None before it is a str; an exact type wins over a conversion (int in `float | int`).
    ordered = sorted(members, key=lambda m: (m is not types.NoneType, type(value) is not m))
    if any(get_origin(m) is Literal and value in get_args(m) for m in members):
        return str(value)
    for member in ordered:
        try:
            return coerce(value, member)
        except Mismatch:
            continue
    raise Mismatch(describe(hint))


def _literal(value: Any, hint: Any) -> Any:
    for allowed in get_args(hint):
        if type(allowed) is type(value) and value == allowed:
            return allowed
        if isinstance(value, Text) and value == str(allowed):
            return allowed
    raise Mismatch(describe(hint), nearest(str(value), [a for a in get_args(hint) if isinstance(a, str)]))


def _container(value: Any, container: type, args: tuple[Any, ...], hint: Any) -> Any:
    if type(value) is not (dict if container is dict else list):
        raise Mismatch(describe(hint))
    if not args:
        return container(value)
    if isinstance(value, dict):
        return {key: coerce(item, args[1]) for key, item in value.items()}
    if container is tuple and Ellipsis not in args:
        if len(value) != len(args):
            raise Mismatch(describe(hint))
        return tuple(coerce(item, arg) for item, arg in zip(value, args, strict=True))
    return container(coerce(item, args[0]) for item in value)
