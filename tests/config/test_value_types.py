"""Kinds of JSON values: what they allow, and that no value, however odd, is more than they can take."""

from __future__ import annotations

from typing import Any

import pytest

from megabridge.config import value_types

DEEP: Any = []
for _ in range(100_000):
    DEEP = [DEEP]
CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("inf"),
    10**5000,
    "",
    "x" * 10**6,
    "\ud800\n",
    [],
    DEEP,
    {},
    CYCLE,
    {1},
    b"",
    object(),
]


@pytest.mark.parametrize(
    ("kind", "allowed", "refused"),
    [
        (value_types.whole(1, 8), [1, 8], [0, 9, True, 1.0, "1", None, [1], 10**30]),
        (value_types.number(0, 1), [0, 1, 0.5, 1e-300], [-1e-9, 1.1, True, float("nan"), float("inf"), "0.5", None, 10**400]),
        (value_types.FLAG, [True, False], [0, 1, "false", None]),
        (value_types.text(3), ["", "abc"], ["abcd", 3, None, ["a"]]),
        (value_types.one_of(1, "a", None), [1, 1.0, "a", None], [True, "b", 2, [1]]),
        (value_types.list_of(value_types.whole(0, 1)), [[], [0, 1], (1,)], [[2], [True], "01", {0}, None]),
        (value_types.OBJECT, [{}, {"a": DEEP}], [{1: 2}, [], "{}", None]),
        (value_types.SCALAR, [None, True, 1, 1.5, "x"], [float("nan"), [], {}]),
        (value_types.FLAG.or_null(), [None, True], ["null"]),
        (value_types.FLAG.or_a(value_types.text()), [True, "x"], [1]),
    ],
)
def test_what_a_kind_allows(kind: value_types.Kind, allowed: list[Any], refused: list[Any]) -> None:
    assert all(kind.allows(value) for value in allowed)
    assert not any(kind.allows(value) for value in refused)
    assert all(isinstance(kind.allows(value), bool) for value in ODD)


def test_a_problem_names_key_value_and_what_is_allowed() -> None:
    kind = value_types.whole(1, 8)
    assert kind.problem({"n": 9}, "n") == "n=9 can't be represented: it must be a whole number from 1 to 8."
    assert kind.problem({}, "n") is None and kind.problem({"n": 3}, "n") is None
    assert "must have 'n', a whole number from 1 to 8" in str(kind.needed().problem({}, "n"))


def test_values_are_shown_on_one_short_line() -> None:
    assert [value_types.shown(value) for value in (1.5, "a\nb", [1, 2, 3, 4])] == ["1.5", "'a\\nb'", "[1, 2, 3, 4]"]
    for value in ODD:
        text = value_types.shown({"key": [value]})
        assert len(text) < 200 and "\n" not in text and text.encode()


def test_depth_is_measured_without_recursion() -> None:
    assert [value_types.is_deep(value) for value in (DEEP, CYCLE, {"a": [{"b": [1]}]}, "x" * 1000)] == [True, True, False, False]
    wide: list[Any] = []
    for _ in range(8):
        wide = [wide] * 1000  # 10^24 in all
    assert not value_types.is_deep(wide)
