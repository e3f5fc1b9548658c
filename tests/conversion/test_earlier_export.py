"""What is at an export's place before it: an earlier export is replaced, what is harmless stays, all else is left and refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megabridge.conversion import manifest
from megabridge.hf.tensor_files import find_tensors
from megabridge.parallel.topology import Topology
from tests.support.manifests import HARMLESS, NORM, edit, first_shard, flip, put
from tests.support.models import TINY
from tests.support.payload import payload
from tests.support.rank_server import RankServer

CASES = "tests.support.export"
DONE = "nothing was raised"


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": {**TINY, "num_hidden_layers": 1}})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def out(ranks: RankServer, source: Path) -> Path:
    """An export in two files and more."""
    folder = source.parent / "out"
    kwargs = {"source": str(source), "outs": {str(folder): {"max_shard_size": "60KB"}}}
    ranks.run(f"{CASES}:exports", topology=Topology(), kwargs=kwargs)
    return folder


def tree(folder: Path) -> dict[str, tuple[str, bytes]]:
    """All that is in a folder: kinds, and what links and files hold."""
    return {
        str(path.relative_to(folder)): ("link", os.fsencode(path.readlink())) if path.is_symlink()
        else ("file", path.read_bytes()) if path.is_file() else ("other", b"")
        for path in folder.rglob("*")
    }  # fmt: skip


def listed(folder: Path, name: str) -> None:
    """A manifest that says of a file of the user's that it is an export's."""
    size = (folder / name).stat().st_size
    entry = {"size": size, "xxh3_128": manifest.file_entry(folder / name).xxh3_128}
    edit(folder, lambda content: content["files"].update({name: entry}))


def linked(folder: Path) -> None:
    """A folder of the manifest's is a link to one outside, where a file of that name is."""
    (folder.parent / "templates").mkdir(exist_ok=True)
    (folder.parent / "templates/x.jinja").write_text("mine")
    (folder / "additional_chat_templates").symlink_to(folder.parent / "templates")
    listed(folder, "additional_chat_templates/x.jinja")


def named(folder: Path, name: str) -> None:
    edit(folder, lambda content: content["files"].update({name: content["files"]["config.json"]}))


FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "names": (
        lambda f: put(f, ["adapter_model.safetensors", "optimizer.safetensors", "tokenizer_notes.json", "vocab.txt", "thesis.tex",
                          "modeling_x.py", "pytorch_model.bin", "model.safetensors", "original/params.json"]),
        ["adapter_model.safetensors: the file is not", "optimizer.safetensors: the", "tokenizer_notes.json: the", "vocab.txt: the",
         "thesis.tex: the", "modeling_x.py: the", "pytorch_model.bin: the", "model.safetensors: the", "original/params.json: the"],
    ),
    "empty folder": (lambda f: (f / "empty").mkdir(), ["empty: the folder is not"]),
    "no manifest": (lambda f: (f / "megabridge.json").unlink(), ["config.json: the file is not", "model-00001-of-"]),
    "damaged manifest": (lambda f: (f / "megabridge.json").write_text("{"), ["megabridge.json"]),
    "linked manifest": (
        lambda f: ((f / "megabridge.json").rename(f.parent / "its.json"), (f / "megabridge.json").symlink_to(f.parent / "its.json")),
        ["megabridge.json: the link is not", "config.json: the file is not"],
    ),
    "config": (lambda f: (f / "config.json").write_text("{}"), ["config.json: the file has other bytes"]),
    "one bit": (lambda f: flip(f, NORM, 1), [f"{NORM} has other bytes"]),
    "other weights": (
        lambda f: save_file({NORM: torch.ones(64, dtype=torch.float64)}, first_shard(f)), ["is missing", "model-00001-of-"]
    ),
    "a link": (
        lambda f: ((f / "config.json").rename(f.parent / "c.json"), (f / "config.json").symlink_to(f.parent / "c.json")),
        ["config.json: the link is not"],
    ),
    "a pipe": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), ["config.json: the pipe is not"]),
    "claimed": (lambda f: (put(f, ["thesis.tex"]), listed(f, "thesis.tex")), ["thesis.tex: the file is not"]),
    "claimed weights": (lambda f: (put(f, ["optimizer.safetensors"]), listed(f, "optimizer.safetensors")), ["optimizer.safetensors: the"]),
    "claimed git": (lambda f: (put(f, [".git/config"]), listed(f, ".git/config"), put(f, ["x.py"])), ["x.py: the file is not"]),
    "claimed link": (linked, ["additional_chat_templates: the link is not"]),
    "parent": (lambda f: (put(f.parent, ["precious"]), named(f, "../precious")), ["the file name '../precious'"]),
    "absolute": (lambda f: (put(f.parent, ["precious"]), named(f, str(f.parent / "precious"))), ["the file name '/"]),
    "dots": (lambda f: named(f, "./config.json"), ["the file name './config.json'"]),
    "case": (lambda f: named(f, "CONFIG.json"), ["the file names 'config.json' and 'CONFIG.json'"]),
}  # fmt: skip
HIDDEN: dict[str, Callable[[Path], object]] = {
    "partial": lambda f: put(f.with_name(f".{f.name}.partial"), ["thesis.tex"]),
    "partial link": lambda f: f.with_name(f".{f.name}.partial").symlink_to(f.parent / "templates"),
    "lock": lambda f: f.with_name(f".{f.name}.lock").write_text("my notes"),
    "lock link": lambda f: f.with_name(f".{f.name}.lock").symlink_to(f.parent / "templates/x.jinja"),
}


def test_what_no_export_wrote_refuses_and_stays(ranks: RankServer, source: Path, out: Path, tmp_path: Path) -> None:
    for name, (change, _) in FOREIGN.items():
        change(Path(shutil.copytree(out, tmp_path / name)))
    (tmp_path / "templates").mkdir(exist_ok=True)
    for name, hide in HIDDEN.items():
        hide(tmp_path / name)
    before = tree(tmp_path)
    names = [*FOREIGN, *HIDDEN]
    for topology, writer in ((Topology(tp=2), "shared"), (Topology(tp=2), "gather")):
        kwargs = {"source": str(source), "folders": [str(tmp_path / name) for name in names], "writer": writer}
        first, second = ranks.run(f"{CASES}:onto", topology=topology, kwargs=kwargs)
        for name, text, other in zip(names, first, second, strict=True):
            assert text.startswith("CheckpointError: ") and other.startswith("CheckpointError: "), f"{name}: {text!r}, {other!r}"
            expected = FOREIGN[name][1] if name in FOREIGN else [f".{name}.{name.split()[0]}"]
            remedy = "another folder, or delete or move these" if name in FOREIGN else "elsewhere, or move these away"
            assert all(part in text for part in (*expected, remedy)), f"{name}: {text}"
        assert tree(tmp_path) == before, "nothing was touched, nothing was left"


def test_an_earlier_export_is_replaced_and_what_is_harmless_stays(
    ranks: RankServer, source: Path, out: Path, tmp_path: Path
) -> None:
    """Also where files of it are gone, and in a folder that holds nothing else, such as a clone of an empty repository."""
    whole, less, clone = tmp_path / "whole", tmp_path / "less", tmp_path / "clone"
    for folder in (whole, less):
        shutil.copytree(out, folder)
    for folder in (whole, clone):
        put(folder, HARMLESS)
        (folder / ".git/link").symlink_to("nowhere")
        os.mkfifo(folder / ".git/watcher")
    first_shard(less).unlink()
    (less / "config.json").unlink()
    inodes = {name: (whole / name).stat().st_ino for name in HARMLESS}
    kwargs = {"source": str(source), "folders": [str(whole), str(less), str(clone)]}
    assert ranks.run(f"{CASES}:onto", topology=Topology(tp=2), kwargs=kwargs) == [[DONE] * 3] * 2
    doubled = {name: (torch.frombuffer(bytearray(data), dtype=torch.float32) * 2) for name, (_, _, data) in payload(source).items()}
    for folder in (whole, less, clone):
        assert sorted(find_tensors(folder)) == sorted(doubled)
        assert all(bytes(doubled[name].numpy().data) == data for name, (_, _, data) in payload(folder).items())
        assert {path.name for path in folder.iterdir() if path.suffix == ".safetensors"} == {"model.safetensors"}
        said = json.loads((folder / "megabridge.json").read_text())
        assert said["files"].keys() == {"config.json", "generation_config.json", "chat_template.jinja"}
    for folder in (whole, clone):
        assert all((folder / name).read_bytes() == b"x" for name in HARMLESS)
        assert (folder / ".git/link").is_symlink() and (folder / ".git/watcher").is_fifo()
    assert {name: (whole / name).stat().st_ino for name in HARMLESS} == inodes, "the same files, not copies"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "less", "whole"]
    folders = [str(folder) for folder in (whole, less, clone)]
    assert ranks.run(f"{CASES}:checked", topology=Topology(), kwargs={"folders": folders}) == [[[], [], []]]


def test_what_changes_while_an_export_is_written_stays(ranks: RankServer, source: Path, out: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(out, tmp_path / "out"))
    ((changed, added, harmless),) = ranks.run(
        f"{CASES}:meddled", topology=Topology(), kwargs={"source": str(source), "out": str(folder)}
    )
    assert "config.json: the file changed while the export was written" in changed
    assert "notes.txt: the file is not in the manifest" in added
    assert harmless == DONE and (folder / "README.md").read_text() == "mine"


def test_no_export_takes_the_place_of_its_source(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    (seen,) = ranks.run(f"{CASES}:sources", topology=Topology(), kwargs={"source": str(source), "root": str(tmp_path)})
    for name, text in seen.items():
        if name in ("elsewhere", "inside"):
            assert text == DONE, f"{name}: {text}"
        else:
            assert "must not be where the model was read from" in text and "export to another folder" in text, f"{name}: {text}"
