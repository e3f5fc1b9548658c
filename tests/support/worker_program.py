"""A program that stands in a worker's place: it runs the Python text in its config, and reports how that ended."""

from __future__ import annotations

import argparse
import json
import os
import sys

from megabridge.launchers.processes import outcome
from megabridge.launchers.processes.outcome import Failure
from megabridge.storage import crash_notes

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--config", "--outcome", "--note", "--fork", "--stop"):
        parser.add_argument(name, type=int)
    parser.add_argument("--digest")
    given = parser.parse_args()
    crash_notes.set_note(crash_notes.new_note(given.note))
    values = json.loads(os.pread(given.config, os.fstat(given.config).st_size, 0))
    rank = int(os.environ.get("RANK", "-1"))

    def work() -> float | None:
        names = {"rank": rank, "result": None}
        exec(values["text"], names)
        return names["result"]

    found = outcome.of(work, rank)
    outcome.write(given.outcome, found)
    sys.exit(found.status if isinstance(found, Failure) else 0)
