"""Findings of checks, one per check and place, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megabridge.errors import MegabridgeError
from megabridge.parallel import collectives


@dataclass(frozen=True)
class Finding:
    """The result of one check (`what`) at one place (`where`: "tiny config", a layout).

    `figure` is the measured value as text, `problems` is empty if the check passed.
    """

    where: str
    what: str
    figure: str = "ok"
    problems: tuple[str, ...] = ()

    @property
    def has_passed(self) -> bool:
        return not self.problems


def failed(where: str, what: str, error: Exception) -> Finding:
    """Returns the finding of a check that ended with an error."""
    text = str(error) if isinstance(error, MegabridgeError) else f"{type(error).__name__}: {error}"
    return Finding(where, what, "FAILED", (text,))


def over_ranks(findings: Sequence[Finding]) -> list[Finding]:
    """Merges the findings of all ranks: a check fails if it failed on any rank. Collective."""
    merged: dict[tuple[str, str], Finding] = {}
    for rank, theirs in enumerate(collectives.all_gather(tuple(findings))):
        for finding in theirs:
            key = (finding.where, finding.what)
            if key not in merged or (merged[key].has_passed and not finding.has_passed):
                problems = tuple(f"rank {rank}: {text}" if rank else text for text in finding.problems)
                merged[key] = Finding(finding.where, finding.what, finding.figure, problems)
    return list(merged.values())


def table(findings: Iterable[Finding]) -> list[str]:
    """Returns the findings as lines of a table: a row per place, a column per check."""
    found = list(findings)
    places, checks = list(dict.fromkeys(f.where for f in found)), list(dict.fromkeys(f.what for f in found))
    cells = {(f.where, f.what): f.figure if f.has_passed else "FAILED" for f in found}
    rows = [["", *checks], *([place, *(cells.get((place, check), "-") for check in checks)] for place in places)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(checks) + 1)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def problems_of(findings: Iterable[Finding]) -> list[str]:
    """Returns a line for each problem, with place and check."""
    return [f"{finding.where}, {finding.what}: {problem}" for finding in findings for problem in finding.problems]
