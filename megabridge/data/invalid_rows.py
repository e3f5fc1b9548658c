"""Rows that can't be used: each is counted by kind and shown, and past a set share they stop the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from megabridge.errors import ConfigError

EXAMPLES: Final = 3
"""Rows of a kind that are named."""
SOON: Final = 1000
"""Rows after which an endless source is judged; others are judged at their end."""


class BadRow(Exception):
    """A row that can't be used: its `kind`, in two or three words, and what is wrong with this one."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(f"{kind}: {why}")
        self.kind, self.why = kind, why


MISSING: Final = "missing field"
EMPTY: Final = "empty"
TOO_LONG: Final = "too long"
ENCODING: Final = "bad encoding"
FORMAT: Final = "not readable"
ROLES: Final = "role order"
REFUSED: Final = "refused by the chat template"
CONTENT: Final = "content that is not text"
INEXACT: Final = "not exact in the chat template"
UNANSWERED: Final = "no answer within the sequence length"


@dataclass
class Tally:
    """How many rows were good, and how many were left out for what. Tallies of parts add up."""

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: str | None = None
    """Where the first of them is."""

    def leave_out(self, where: str, row: BadRow) -> None:
        """Counts `row`, found at `where`."""
        self.bad[row.kind] += 1
        self.first = self.first or where
        named = self.examples.setdefault(row.kind, [])
        if len(named) < EXAMPLES:
            named.append(f"{where}: {row.why}")

    def add(self, other: Tally) -> None:
        """Takes over the counts of another part, which comes after this one."""
        self.good += other.good
        self.bad.update(other.bad)
        self.first = self.first or other.first
        for kind, named in other.examples.items():
            own = self.examples.setdefault(kind, [])
            own.extend(named[: EXAMPLES - len(own)])

    @property
    def rows(self) -> int:
        return self.good + self.bad.total()

    def judge(self, largest_share: float, what: str, key: str = "data.max_bad_share") -> None:
        """Raises ConfigError, with every kind and examples, where more than `largest_share` of the rows are bad or none is good.

        `key` is where that share is set.
        """
        count = self.bad.total()
        if self.good and count <= largest_share * self.rows:
            return
        if not self.rows:
            raise ConfigError(f"{what} has no row; name a source that has some.")
        lines = [
            f"{what}: {count} of {self.rows} rows can't be used, which is more than {key}={largest_share:g}; "
            "mend them, or raise that share:"
            if self.good
            else f"{what}: none of {self.rows} rows can be used; mend them:"
        ]
        for kind, number in self.bad.most_common():
            lines.append(f"{number} {kind}")
            lines.extend(f"    {example}" for example in self.examples[kind])
        raise ConfigError("\n  ".join(lines))

    def describe(self) -> str:
        """`5 of 100 rows left out (3 empty, 2 too long), the first at FILE:8`, or nothing."""
        if not self.bad:
            return ""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.bad.most_common())
        return f"{self.bad.total()} of {self.rows} rows left out ({kinds}), the first at {self.first}"


def check_share(share: float) -> None:
    """Raises ConfigError unless `share` is one."""
    if not 0 <= share <= 1:
        raise ConfigError(f"data.max_bad_share={share} must be from 0 to 1, e.g. 0.01.")
