"""Links in folders of others: what a model carries along lies in its folder, or among the blobs of its own repository."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megabridge.bridge import upload
from megabridge.errors import CheckpointError
from megabridge.hf import assets
from megabridge.hf.opened_folder import OpenedFolder
from megabridge.hf.tensor_files import find_tensors
from megabridge.storage.inside_folder import inside

HASH = "ab" + "0" * 62


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/key").write_text('{"key": 1}')
    (tmp_path / "secrets/x.jinja").write_text("key")
    return tmp_path / "secrets/key"


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "vocab.txt").write_text("a")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    return folder


def ways(folder: Path) -> list[tuple[str, Callable[[], object]]]:
    """What copies files of a folder, or reads its weights."""
    return [
        ("export", lambda: OpenedFolder.of(folder, code=True)),
        ("tokenizer", lambda: assets.read_assets(folder)),
        ("push", lambda: upload._files(folder)),
        ("weights", lambda: find_tensors(folder)),
    ]


@pytest.mark.parametrize(
    ("name", "target", "which"),
    [
        ("vocab.txt", "../secrets/key", "export tokenizer push"),
        ("tokenizer.json", "{root}/secrets/key", "export tokenizer push"),
        ("tokenizer.model.v9", "middle", "export tokenizer push"),
        ("merges.txt", "../nothing", "export tokenizer push"),
        ("vocab.json", "vocab.json", "export tokenizer push"),
        ("added_tokens.json", "/dev/zero", "export tokenizer push"),
        ("additional_chat_templates", "../secrets", "export tokenizer push"),
        ("configuration_x.py", "../secrets/key", "export push"),
        ("config.json", "../secrets/key", "export push"),
        ("model.safetensors", "../secrets/weights", "push weights"),
        ("notes.txt", "../secrets/key", "push"),
        ("chat_template.jinja", "sub/../../secrets/key", "export tokenizer push"),
        ("special_tokens_map.json", "../blobs/key", "export tokenizer push"),
    ],
)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, secret: Path, name: str, target: str, which: str) -> None:
    folder = model(tmp_path / "model")
    (folder / "sub").mkdir()
    (folder / "middle").symlink_to(secret)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/key").write_text("key")
    save_file({"a": torch.ones(1)}, tmp_path / "secrets/weights")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target.format(root=tmp_path))
    for what, work in ways(folder):
        if what in which.split():
            with pytest.raises(CheckpointError, match=r"must (lie inside its folder, but leads to|exist|be a file)") as caught:
                work()
            assert name in str(caught.value), what
        elif what != "push":  # `middle` itself
            work()


def test_all_of_them_are_named(tmp_path: Path, secret: Path) -> None:
    folder = model(tmp_path / "model")
    for name in ("merges.txt", "tokenizer.json"):
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "vocab.json")
    with pytest.raises(CheckpointError) as caught:
        assets.read_assets(folder)
    assert all(name in str(caught.value) for name in ("merges.txt", "tokenizer.json", "vocab.json must be a file, not a pipe"))


def test_links_inside_and_hard_links_are_followed(tmp_path: Path, secret: Path) -> None:
    folder = model(tmp_path / "model")
    (folder / "parts").mkdir()
    (folder / "parts/merges").write_text("b")
    (folder / "merges.txt").symlink_to("parts/merges")
    (folder / "vocab.json").hardlink_to(secret)
    (folder / "tokenizer_notes.json").mkdir()  # a folder is none of a model's files
    (folder / "model.safetensors").rename(folder / "parts/weights")
    (folder / "model.safetensors").symlink_to("parts/weights")
    (tmp_path / "link").symlink_to("model")
    for place in (folder, tmp_path / "link"):
        assert assets.read_assets(place) == {"merges.txt": b"b", "vocab.json": b'{"key": 1}', "vocab.txt": b"a"}
        assert set(find_tensors(place)) == {"a"}
        (place / ".git").mkdir(exist_ok=True)
        (place / ".git/config").write_text("mine")
        assert set(upload._files(place)) == {
            "config.json", "merges.txt", "model.safetensors", "parts/merges", "parts/weights", "vocab.json", "vocab.txt",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("snapshot", "target", "is_followed"),
    [
        ("models--a--b/snapshots/abc", "../../blobs/0123", True),
        ("models--a--b/snapshots/abc/sub", "../../../blobs/0123", True),
        ("models--a--b/snapshots/abc", "../../blobs/shared", True),
        ("models--a--b/snapshots/abc", f"../../../blobs/ab/{HASH}", True),
        ("models--a--b/snapshots/abc", "../../../models--a--c/blobs/0123", False),
        ("models--a--b/snapshots/abc", "../../../blobs/ab/key", False),
        ("models--a--b/snapshots/abc", f"../../../blobs/cd/{HASH}", False),
        ("models--a--b/snapshots/abc", "../../blobs/out", False),
        ("models--a--b/snapshots/abc", "../../blobs/sub/key", False),
        ("models--a--b/snapshots/abc", "../../key", False),
        ("models--a--b/other/abc", "../../blobs/0123", False),
        ("mine/snapshots/abc", "../../blobs/0123", False),
        ("datasets--a--b/snapshots/abc", "../../blobs/0123", False),
    ],
)
def test_links_into_the_hub_cache(tmp_path: Path, secret: Path, snapshot: str, target: str, is_followed: bool) -> None:
    folder = tmp_path / snapshot
    folder.mkdir(parents=True)
    for repository in {tmp_path / Path(snapshot).parts[0], tmp_path / "models--a--c"}:
        (repository / "blobs/sub").mkdir(parents=True)
        for name in ("blobs/0123", "blobs/sub/key", "key"):
            (repository / name).write_text("a")
        (repository / "blobs/out").symlink_to(secret)
        (repository / "blobs/shared").symlink_to(f"../../blobs/ab/{HASH}")
    for prefix in ("ab", "cd"):
        (tmp_path / "blobs" / prefix).mkdir(parents=True)
        for name in (HASH, "key"):
            (tmp_path / "blobs" / prefix / name).write_text("a")
    (folder / "vocab.txt").symlink_to(target)
    if is_followed:
        assert inside(folder, "vocab.txt").read_text() == "a" and assets.read_assets(folder) == {"vocab.txt": b"a"}
    else:
        with pytest.raises(CheckpointError, match="must lie inside its folder"):
            assets.read_assets(folder)
