"""One page that compares the runs of a sweep: recipe=report sweep=DIR."""

from __future__ import annotations

from megabridge.config import Config
from megabridge.launchers import results, sweep
from megabridge.launchers.page import page
from recipes.collect import sweep_folder


def main(config: Config) -> None:
    """Writes report.html in the sweep's directory, from sweep.json and the runs' metrics as they are now."""
    folder = sweep_folder(config)
    file = folder / "report.html"
    file.write_text(page(f"Sweep {folder.name}", results.rows(sweep.read(folder))), encoding="utf-8")
    print(f"wrote {file}")
