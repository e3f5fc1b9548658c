"""What the documentation says can be done: its commands compose, its Python runs, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from megabridge.conformance.families_table import renewed, table
from megabridge.data import DataModule
from megabridge.errors import ConfigError
from megabridge.families import all_families
from megabridge.hf import byte_tokenizer
from tests.support.pages import COMMANDS, ENVIRONMENT, PAGES, PYTHON, ROOT
from tests.support.rank_server import RankServer


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(ranks: RankServer, command: str, tmp_path: Path) -> None:
    done = ranks.program([*shlex.split(command)[3:], "--cfg", "job"], cwd=tmp_path)
    assert done.returncode == 0 and "recipe:" in done.stdout, done.stderr


def test_every_page_was_looked_at() -> None:
    assert len(COMMANDS) >= 10
    assert PYTHON.keys() == {"README.md", "docs/models.md", "docs/data.md", "docs/autobridge.md", "docs/adding-a-family.md"}


def test_python_of_the_readme(smollm2: Path, tmp_path: Path) -> None:
    output = run([sys.executable, "-c", PYTHON["README.md"]], tmp_path)
    assert output.count("0 mismatched") == 2
    assert {path.name for path in (tmp_path / "smollm2-again").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert smollm2.is_dir()


def test_python_of_the_page_on_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(PYTHON["docs/models.md"], {})
    assert (tmp_path / "tiny" / "model.safetensors").is_file()


def test_python_of_the_page_on_data(tmp_path: Path) -> None:
    names: dict[str, type[DataModule]] = {}
    exec(PYTHON["docs/data.md"], names)
    byte_tokenizer.write_tokenizer(tmp_path)
    data = names["Pairs"]([("2 + 2", "4"), ("3 + 3", "six" * 99)])  # type: ignore[call-arg]
    data.setup(tmp_path, seq_length=96, micro_batch_size=1, global_batch_size=2, seed=0)
    batches = list(islice(data.train_batches(0, dp_rank=0, dp_size=1), 2))
    assert [int(batch["loss_mask"].sum()) for batch in batches] == [2, 2]
    assert data.describe().startswith("pairs: 1 samples") and "1 too long" in data.describe()


def headings(page: Path) -> set[str]:
    """What links call the sections of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, section = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists() and (not section or section in headings(there)), target


def test_the_readmes_table_is_the_families() -> None:
    """When it isn't: python -m megabridge.conformance.families_table README.md"""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    written = table(ROOT / "conf" / "model")
    assert all(f"| `{architecture}` |" in written for architecture in all_families())
    assert renewed(text, written) == text
    with pytest.raises(ConfigError, match="add them"):
        renewed("no marks", written)


def test_the_reference_is_the_docstrings() -> None:
    """When it isn't: python docs/api.py > docs/api.md"""
    there = runpy.run_path(str(ROOT / "docs" / "api.py"))
    assert there["page"]() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
