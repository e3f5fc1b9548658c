"""Fine-tuning rows that ranks tokenise together: what one process alone would have, bit for bit; a failure is everybody's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megabridge.data import reading
from megabridge.hf import byte_tokenizer
from megabridge.parallel.topology import Topology
from tests.support import data as case
from tests.support.chat_rows import BAD, chat, jsonl
from tests.support.rank_server import RankServer

CASES = "tests.support.data"
GOOD = [chat(number) for number in range(60)]
UNUSABLE = [row for rows in BAD.values() for row in rows]
MIXED = [row for pair in zip(GOOD, UNUSABLE, strict=False) for row in pair] + GOOD[len(UNUSABLE) :] + GOOD[:5]
"""Good and bad rows in turns, then good ones, five of them for the second time."""
LATE = [{"nothing": 1}, {"other": "row"}, b"{", GOOD[0], {"text": "It would be another schema."}, *GOOD[1:20]]
"""The fourth row decides the schema, for the rank that tokenises the fifth too."""
PAIRS = [{"prompt": f"{number} + 1 = ", "completion": str(number + 1)} for number in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.write_tokenizer(folder)
    return str(folder)


JOBS: list[tuple[list[Any], dict[str, Any]]] = [
    (MIXED, {"block": 4}),
    (MIXED, {"block": 5, "piece": 1000, "overlong": "truncate", "validation_share": 0.2}),
    (LATE, {"block": 1, "piece": 100}),
    (PAIRS, {"block": 3}),
    (PAIRS, {"block": 20, "prompt_as_chat": True}),  # the first rank has them all
]


@pytest.fixture(scope="module")
def jobs(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The arguments of each job."""
    folder = tmp_path_factory.mktemp("jobs")
    # Chats need no end-of-text token, nor do ranks that tokenise none.
    endless = shutil.copytree(tokenizer, folder / "endless")
    settings = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))
    made = []
    for number, (rows, given) in enumerate(JOBS):
        path = jsonl(folder / f"{number}.jsonl", rows)
        own = str(endless) if "prompt_as_chat" in given else tokenizer
        made.append({"path": str(path), "tokenizer": own, "max_bad_share": 0.5, **given})
    return made


@pytest.mark.parametrize("topology", [Topology(dp=2), Topology(tp=3)], ids=str)
def test_every_rank_has_what_one_process_has(ranks: RankServer, jobs: list[dict[str, Any]], topology: Topology) -> None:
    found = ranks.run(f"{CASES}:read_all", topology=topology, kwargs={"jobs": jobs})
    for number, (job, (rows, settings)) in enumerate(zip(jobs, JOBS, strict=True)):
        alone = case.read(**{**job, "block": len(rows)})
        encoded = alone.pop("encoded")
        assert len(alone["all"]) == alone["tally"].good > 0 and len(alone["validation"]) > 0
        shares = []
        for rank in found:
            shares.append(rank[number].pop("encoded"))
            assert rank[number] == alone, settings
            assert list(rank[number]["tally"].bad) == list(alone["tally"].bad)
        assert sum(shares) == encoded
        assert max(shares) < encoded or settings["block"] > len(rows)


def test_too_many_bad_rows_are_the_same_error_everywhere(ranks: RankServer, tokenizer: str, tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", MIXED))
    alone, _ = case.failing([path], tokenizer, block=4)
    assert f"{len(UNUSABLE)} of {len(MIXED)} rows can't be used" in alone and f"{path}:2: " in alone
    said = ranks.run(f"{CASES}:failing", topology=Topology(dp=3), kwargs={"paths": [path] * 3, "tokenizer": tokenizer, "block": 4})
    assert [message for message, _ in said] == [alone] * 3


def test_what_fails_on_one_rank_fails_on_all(ranks: RankServer, tokenizer: str, tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "rows.jsonl", GOOD))
    settings = {"paths": [path] * 3, "tokenizer": tokenizer, "block": 4, "fails_at": "question 23"}
    # Row 23 is in the block of rank 2, in the second round.
    said = ranks.run(f"{CASES}:failing", topology=Topology(dp=3), kwargs=settings)
    own = "ZeroDivisionError: integer division or modulo by zero"
    others = f"MegabridgeError: rank 2 failed while reading data.path={path}: {own}"
    assert [message for message, _ in said] == [others, others, own]
    assert max(seconds for _, seconds in said) < 30


def test_a_file_that_one_rank_can_not_read_fails_on_all(ranks: RankServer, tokenizer: str, tmp_path: Path) -> None:
    path, missing = str(jsonl(tmp_path / "rows.jsonl", GOOD)), str(tmp_path / "missing.jsonl")
    said = ranks.run(
        f"{CASES}:failing", topology=Topology(dp=2), kwargs={"paths": [path, missing], "tokenizer": tokenizer, "block": 4}
    )
    own = f"ConfigError: {missing} names no file; check the path."
    assert [message for message, _ in said] == [f"ConfigError: rank 1 failed while reading data.path={path}: {own}", own]
    assert max(seconds for _, seconds in said) < 30


@pytest.mark.parametrize(("count", "first", "second"), [(3, "60", "3"), (70, "60", "64 or more"), (0, "32 or more", "0")])
def test_files_that_are_not_the_same_on_every_host(
    ranks: RankServer, tokenizer: str, tmp_path: Path, count: int, first: str, second: str
) -> None:
    paths = [str(jsonl(tmp_path / "a.jsonl", GOOD)), str(tmp_path / "b.jsonl")]
    Path(paths[1]).write_text("".join(json.dumps(chat(number)) + "\n" for number in range(count)))
    arguments = {"paths": paths, "tokenizer": tokenizer, "block": 32 if count != 0 else 16}
    said = ranks.run(f"{CASES}:failing", topology=Topology(dp=2), kwargs=arguments)
    for path, (message, _) in zip(paths, said, strict=True):
        assert message == (
            f"ConfigError: data.path={path} has {first} rows on rank 0 but {second} on rank 1; give every host the same files."
        )


def test_bytes_of_all_ranks(ranks: RankServer) -> None:
    sizes = [0, 10, 1000]
    expected = [bytes((number * 50 + place) % 251 for place in range(size)) for number, size in enumerate(sizes)]
    for piece in (1000, 999, 64 << 20):
        found = ranks.run(f"{CASES}:together", world_size=None, topology=Topology(dp=3), kwargs={"sizes": sizes, "piece": piece})
        assert found == [expected] * 3


def test_a_long_reading_says_how_far_it_is(
    tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl(tmp_path / "rows.jsonl", GOOD)
    case.read(str(path), tokenizer, block=20)
    assert "rows tokenised" not in capsys.readouterr().err
    monkeypatch.setattr(reading, "SECONDS", 0.0)
    case.read(str(path), tokenizer, block=20)
    said = capsys.readouterr().err.splitlines()
    assert [line.rpartition(" in ")[0] for line in said] == [f"data.path={path}: {count} rows tokenised" for count in (20, 40, 60)]
