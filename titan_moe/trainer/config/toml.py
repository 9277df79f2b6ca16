"""A TOML file and a command line as one nested dict whose leaves know where they came from.

Nothing here knows which keys exist, and nothing here imports torch: a missing or broken file is
reported before anything heavy loads.
"""

import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_moe.trainer.config.errors import ConfigError, nearest

COMMAND_LINE = "command line"
USAGE = "usage: CONFIG.toml [--section.key value ...]"


class Text(str):
    """A value as typed on the command line; the key's type decides how it is read."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """A leaf: a value somebody wrote.

    Attributes:
        value: what TOML says, or Text.
        origin: the file as the user named it, or COMMAND_LINE.
        flag: ``--section.key`` or ``--section.no-key``, without a value.
    """

    value: Any
    origin: str
    flag: bool = False


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything the user said.

    Attributes:
        config_file: the TOML file.
        values: nested tables; leaves are Given. The command line has already won.
    """

    config_file: Path
    values: dict[str, Any]

    def blame(self, message: str) -> str:
        """Where to look: COMMAND_LINE if ``message`` names a key that was set there, else the file."""
        words = set(re.findall(r"[\w.]+", message))
        typed = any(path in words for path, leaf in leaves(self.values) if leaf.origin == COMMAND_LINE)
        return COMMAND_LINE if typed else str(self.config_file)

    def table(self, path: str) -> dict[str, Any]:
        """The table at a dotted path; empty where there is none."""
        found: Any = self.values
        for part in path.split(".") if path else ():
            found = found.get(part, {}) if isinstance(found, dict) else {}
        return found if isinstance(found, dict) else {}


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Given]]:
    """Every (dotted path, leaf) of a nested table."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(argv: Sequence[str]) -> Settings:
    """Reads ``[CONFIG.toml, --section.key, value, ...]``.

    Raises:
        ConfigError: no file, an unreadable file, TOML that does not parse, or arguments that are not
            of the forms ``--a.b value``, ``--a.b=value``, ``--a.b``, ``--a.no-b``.
    """
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"{COMMAND_LINE}: the first argument must be a TOML file; {USAGE}")
    config_file = Path(argv[0])
    values = _wrap(_parse(config_file), str(config_file))
    for path, leaf in _arguments(argv[1:]):
        _set(values, path, leaf)
    return Settings(config_file=config_file, values=values)


def _parse(config_file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        siblings = config_file.parent.glob("*.toml") if config_file.parent.is_dir() else ()
        raise ConfigError(
            f"{config_file}: no such file{nearest(str(config_file), map(str, siblings))}"
        ) from None
    except OSError as error:
        raise ConfigError(f"{config_file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{config_file}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config_file}: not valid TOML: {error}") from None


def _wrap(table: dict[str, Any], origin: str) -> dict[str, Any]:
    return {
        key: _wrap(value, origin) if isinstance(value, dict) else Given(value=value, origin=origin)
        for key, value in table.items()
    }


def _arguments(argv: Sequence[str]) -> Iterator[tuple[list[str], Given]]:
    """Each option as (path of keys, leaf)."""
    rest = list(argv)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        path = name.replace("-", "_").split(".")
        if not option.startswith("--") or not all(path):
            raise ConfigError(f"{COMMAND_LINE}: {option!r} is not an option; {USAGE}")
        if not equals and rest and not rest[0].startswith("--"):
            equals, value = " ", rest.pop(0)
        if equals:
            yield path, Given(value=Text(value), origin=COMMAND_LINE)
        elif path[-1].startswith("no_"):
            yield (
                [*path[:-1], path[-1].removeprefix("no_")],
                Given(value=False, origin=COMMAND_LINE, flag=True),
            )
        else:
            yield path, Given(value=True, origin=COMMAND_LINE, flag=True)


def _set(values: dict[str, Any], path: list[str], leaf: Given) -> None:
    table = values
    for depth, key in enumerate(path[:-1], start=1):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"{COMMAND_LINE}: --{'.'.join(path)}: {'.'.join(path[:depth])} is one value, not a table; "
                "set it whole"
            )
    table[path[-1]] = leaf
