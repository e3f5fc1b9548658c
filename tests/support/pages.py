"""What the pages of the documentation have in them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import dedent

from tests.support.command import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "MEGABRIDGE_PLATFORM": "cpu"}


def blocks(page: Path) -> list[str]:
    """The indented code of a page."""
    return [dedent(block) for block in re.findall(r"(?:^ {4}.*\n|^\n(?=\n* {4}))+", page.read_text(encoding="utf-8"), re.MULTILINE)]


COMMANDS = sorted(
    {
        line
        for page in PAGES
        for block in blocks(page)
        for line in block.splitlines()
        if line.startswith("python -m megabridge.run") and "--help" not in line and "--cfg" not in line
    }
)


PYTHON = {str(page.relative_to(ROOT)): block for page in PAGES for block in blocks(page) if block.lstrip().startswith("from ")}
