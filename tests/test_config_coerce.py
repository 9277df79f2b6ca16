"""Single values against type annotations: what fits, and the words for what does not."""

from pathlib import Path
from typing import Any, Literal

import pytest

from titan_moe.trainer.config.coerce import Mismatch, coerce
from titan_moe.trainer.config.toml import Text


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3, float, 3.0),
        (3, float | int, 3),
        (3.5, float | int, 3.5),
        ("none", int | None, None),
        ("none", str | None, None),
        ("none", float | Literal["none"] | None, "none"),
        ([0.9, 1], tuple[float, float], (0.9, 1.0)),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([["a"]], list[list[str]] | None, [["a"]]),
        ({"a": 1}, dict[str, Any], {"a": 1}),
        ("p", Path, Path("p")),
        (Text("1"), int, 1),
        (Text("1"), float, 1.0),
        (Text("1"), str, "1"),
        (Text("True"), bool, True),
        (Text("1e-3"), float | int, 1e-3),
        (Text("none"), str | None, None),
        (Text("[1, 2]"), list[int], [1, 2]),
        (Text('{"a": 1}'), dict[str, int], {"a": 1}),
        (Text("{a = 1}"), dict[str, int], {"a": 1}),
        (Text("plain"), Any, "plain"),
        (Text("1.5"), Any, 1.5),
    ],
)
def test_values_that_fit(value: Any, hint: Any, wanted: Any) -> None:
    got = coerce(value, hint)
    assert got == wanted
    assert type(got) is type(wanted)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (128.5, int, "an integer"),
        (128.0, int, "an integer"),
        ("128", int, "an integer"),
        (True, int, "an integer"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (1, str, "a string"),
        ("none", int, "an integer"),
        ("1", list[str], "a list, each item a string"),
        ([1], list[str], "a string"),
        ([0.9], tuple[float, float], r"a list of 2 \(a number, a number\)"),
        ({"a": "b"}, dict[str, int], "an integer"),
        ([], dict[str, int], "a table"),
        ("c", Literal["a", "b"], "one of 'a', 'b'"),
        (1, Literal["1"], "'1'"),
        ("x", int | None, "an integer or 'none'"),
        (Text("1.5"), int, "an integer"),
        (Text("yes"), bool, "true or false"),
        (Text("[1"), list[int], "written as a TOML or JSON literal"),
        (Text("1\nb = 2"), list[int], "written as a TOML or JSON literal"),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, expected: str) -> None:
    with pytest.raises(Mismatch, match=expected):
        coerce(value, hint)
