"""Writes a page that compares the runs of a sweep: recipe=report sweep=DIR."""

from __future__ import annotations

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers import results, sweep
from megabridge.launchers.html_report import render
from megabridge.storage import atomic_files
from recipes.collect import sweep_folder


def main(config: Config) -> None:
    """Writes report.html to the sweep's directory, from sweep.json and the current metrics of the runs."""
    folder = sweep_folder(config)
    text = render(f"Sweep {folder.name}", results.rows(sweep.read(folder)))
    file = folder / "report.html"
    try:
        atomic_files.write(file, text)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}; copy the sweep to where you may write.") from error
    print(f"wrote {file}")
