"""HTML report that compares the runs of a sweep, in one self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from megabridge.errors import plain
from megabridge.launchers.results import MEASURES, Row, number, shown

_WIDTH: Final = 720
_HEIGHT: Final = 280
_MARGIN: Final = 48
_COLOURS: Final = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5ea2", "#e08e1b", "#4d4d4d", "#17a2a2", "#a0522d")
# The page may show untrusted text: if some of it were taken for markup, a browser would still run and load nothing.
_POLICY: Final = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
_STYLE: Final = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #ddd; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } tr.bad td { color: #a33; }
pre { white-space: pre-wrap; } .wide { overflow-x: auto; } dt { font-family: monospace; }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd; } th, td { border-color: #444; } }
"""


def render(title: str, found: Sequence[Row]) -> str:
    """Returns the report's HTML for ranked rows."""
    columns = "".join(f"<dt>{_text(name)}</dt><dd>{_text(MEASURES[name])}</dd>" for name in shown(found))
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<div class="wide">{_table(found)}</div>',
        _chart(found),
        *(f"<h2>Point {_text(row.number)}: {_text(row.state)}</h2><pre>{_text(row.error)}</pre>" for row in found if row.error),
        f"<h2>Columns</h2><dl>{columns}</dl>",
    ]
    head = f'<meta charset="utf-8">{_POLICY}<title>{_text(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>' + "\n".join(parts) + "</body></html>\n"


def _text(value: object) -> str:
    """Escapes a value for the page. Every value goes through it, since a sweep's files may be someone else's."""
    return escape(plain(str(value)))


def _table(found: Sequence[Row]) -> str:
    names = shown(found)
    headings = ["rank", "point", *(found[0].varied if found else ()), "state", *names, "run"]
    lines = ["<tr>" + "".join(f"<th>{_text(text)}</th>" for text in headings) + "</tr>"]
    for rank, row in enumerate(found, 1):
        texts = [rank, row.number, *row.varied.values(), row.state]
        cells = "".join(f"<td>{_text(text)}</td>" for text in texts)
        cells += "".join(f'<td class="number">{_text(number(row.measures[name]))}</td>' for name in names)
        cells += f"<td>{_text(row.run_dir)}</td>"
        lines.append(f"<tr{' class="bad"' if row.error else ''}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _chart(found: Sequence[Row]) -> str:
    """SVG chart of validation loss over steps, one line per point; "" where no run has two losses."""
    drawn = [row for row in found if len(row.losses) > 1]
    if not drawn:
        return ""
    steps = [step for row in drawn for step, _ in row.losses]
    losses = [loss for row in drawn for _, loss in row.losses]
    left, right, low, high = min(steps), max(steps), min(losses), max(losses)

    def coordinates(step: int, loss: float) -> str:
        x = _MARGIN + (step - left) / max(right - left, 1) * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - (loss / 2 - low / 2) / ((high / 2 - low / 2) or 1.0) * (_HEIGHT - 2 * _MARGIN)
        return f"{x:.1f},{y:.1f}"

    lines, names = [], []
    for index, row in enumerate(drawn):
        colour = _COLOURS[index % len(_COLOURS)]
        said = " ".join(f"{key}={value}" for key, value in row.varied.items())
        points = " ".join(coordinates(step, loss) for step, loss in row.losses)
        lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{points}"/>')
        names.append(f'<li style="color:{colour}">point {_text(row.number)} {_text(said)}</li>')
    frame = f"M{_MARGIN},{_MARGIN} V{_HEIGHT - _MARGIN} H{_WIDTH - _MARGIN}"
    axes = f'<path d="{frame}" fill="none" stroke="#888"/>' + "".join(
        f'<text x="{x}" y="{y}" font-size="12" fill="currentColor">{_text(text)}</text>'
        for x, y, text in (
            (4, _MARGIN, f"{high:.4g}"),
            (4, _HEIGHT - _MARGIN, f"{low:.4g}"),
            (_MARGIN, _HEIGHT - _MARGIN + 18, f"step {left}"),
            (_WIDTH - _MARGIN - 40, _HEIGHT - _MARGIN + 18, f"step {right}"),
        )
    )
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="validation loss over steps">{axes}{"".join(lines)}</svg>'
    return f"<h2>Validation loss</h2>{svg}<ul>{''.join(names)}</ul>"
