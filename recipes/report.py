"""One page that compares the runs of a sweep: recipe=report sweep=DIR."""

from __future__ import annotations

from megabridge.config.schema import Config
from megabridge.errors import ConfigError
from megabridge.launchers import results, sweep
from megabridge.launchers.html_report import page
from recipes.collect import sweep_folder


def main(config: Config) -> None:
    """Writes report.html in the sweep's directory, from sweep.json and the runs' metrics as they are now."""
    folder = sweep_folder(config)
    text = page(f"Sweep {folder.name}", results.rows(sweep.read(folder)))
    file, partial = folder / "report.html", folder / ".report.html"
    try:
        partial.unlink(missing_ok=True)  # a link in a sweep of others would lead out of it
        with partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
        partial.replace(file)
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}; copy the sweep to where you may write.") from error
    print(f"wrote {file}")
