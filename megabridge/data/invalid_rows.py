"""Unusable rows: they are counted by kind, some are shown, and above a configured share they stop the run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from megabridge.errors import ConfigError

EXAMPLES: Final = 3
"""Rows of each kind that a message shows."""
SOON: Final = 1000
"""Rows after which the share is checked in a stream; for other sources it is checked at the end."""


class BadRow(Exception):
    """An unusable row: its `kind`, in a few words, and why this one can't be used."""

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
    """Counts of good rows, and of rows left out, by kind. Tallies of parts can be added."""

    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    first: str | None = None
    """Place of the first row that was left out."""

    def leave_out(self, where: str, row: BadRow) -> None:
        """Counts `row`, found at `where`."""
        self.bad[row.kind] += 1
        self.first = self.first or where
        named = self.examples.setdefault(row.kind, [])
        if len(named) < EXAMPLES:
            named.append(f"{where}: {row.why}")

    def add(self, other: Tally) -> None:
        """Adds the counts of another part, which comes after this one."""
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

        `key` is the setting of that share.
        """
        count = self.bad.total()
        if self.good and count <= largest_share * self.rows:
            return
        if not self.rows:
            raise ConfigError(f"{what} has no row; name a source that has some.")
        lines = [
            f"{what}: {count} of {self.rows} rows can't be used, which is more than {key}={largest_share:g}; "
            "correct them, or raise that share:"
            if self.good
            else f"{what}: none of {self.rows} rows can be used; correct them:"
        ]
        for kind, number in self.bad.most_common():
            lines.append(f"{number} {kind}")
            lines.extend(f"    {example}" for example in self.examples[kind])
        raise ConfigError("\n  ".join(lines))

    def describe(self) -> str:
        """Returns `5 of 100 rows left out (3 empty, 2 too long), the first at FILE:8`, or an empty string."""
        if not self.bad:
            return ""
        kinds = ", ".join(f"{number} {kind}" for kind, number in self.bad.most_common())
        return f"{self.bad.total()} of {self.rows} rows left out ({kinds}), the first at {self.first}"


def check_share(share: float) -> None:
    """Raises ConfigError unless `share` is from 0 to 1."""
    if not 0 <= share <= 1:
        raise ConfigError(f"data.max_bad_share={share} must be from 0 to 1, e.g. 0.01.")
