"""The manifest of an exported folder: it says what is there, and any change after that is found and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from megabridge.hf.tensor_files import find_tensors
from megabridge.parallel.topology import Topology
from tests.support.manifests import HARMLESS, NORM, edit, first_shard, flip, put
from tests.support.models import TINY, changed_model
from tests.support.payload import payload
from tests.support.rank_server import RankServer

CASES = "tests.support.export"
QKV = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": TINY})
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def out(ranks: RankServer, source: Path) -> Path:
    """A sharded export and one in bfloat16, from four ranks."""
    folder = source.parent / "out"
    outs = {str(folder): {"max_shard_size": "100KB"}, str(folder.with_name("bf16")): {"weight_dtype": "bfloat16"}}
    ranks.run(f"{CASES}:exports", topology=Topology(tp=2, pp=2), kwargs={"source": str(source), "outs": outs})
    return folder


def test_it_says_what_is_in_the_folder(out: Path, source: Path) -> None:
    said = json.loads((out / "megabridge.json").read_text())
    tensors, infos = payload(out), find_tensors(out)
    assert list(said["tensors"]) == list(infos) and len({info.file for info in infos.values()}) > 2
    for name, entry in said["tensors"].items():
        data = (out / entry["file"]).read_bytes()[entry["offset"] :][: len(tensors[name][2])]
        assert data == payload(source)[name][2], "the place is the tensor's"
        assert entry == {
            "file": infos[name].file.name,
            "offset": infos[name].start,
            "dtype": "F32",
            "shape": list(tensors[name][1]),
            "xxh3_128": xxhash.xxh3_128_hexdigest(data),
        }
    others = {path.name for path in out.iterdir()} - {entry["file"] for entry in said["tensors"].values()} - {"megabridge.json"}
    assert (
        others
        == said["files"].keys()
        == {"config.json", "generation_config.json", "model.safetensors.index.json", "chat_template.jinja"}
    )
    for name, entry in said["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert said["layout"] == {"tp": 2, "pp": 2, "vpp": 1, "cp": 1, "ep": 1, "etp": 2, "dp": 1}
    assert said["versions"].keys() == {"megabridge", "megatron-core", "torch"}


def swap(folder: Path) -> None:
    """Two tensors of one shape change places in the payload."""
    data = payload(folder)
    norms = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    for name, other in zip(norms, reversed(norms), strict=True):
        info = find_tensors(folder)[name]
        with info.file.open("r+b") as stream:
            stream.seek(info.start)
            stream.write(data[other][2])


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "one bit": (lambda f: flip(f, QKV, 0), [f": {QKV} has other bytes"]),
    "the last bit": (lambda f: flip(f, NORM, find_tensors(f)[NORM].nbytes - 1), [f": {NORM} has other bytes"]),
    "two tensors": (lambda f: (flip(f, QKV, 7), flip(f, NORM, 3)), [f": {QKV} has other bytes", f": {NORM} has other bytes"]),
    "swapped": (swap, [": model.layers.0.input_layernorm.weight has other bytes", ": model.layers.0.post_attention_layernorm.weight has other bytes"]),
    "truncated": (lambda f: os.truncate(first_shard(f), first_shard(f).stat().st_size - 1), ["bytes by its header, but has"]),
    "no shard": (lambda f: first_shard(f).unlink(), ["model-00001-of-", "the file is missing"]),
    "another shard": (lambda f: save_file({"x": torch.ones(2)}, f / "z.safetensors"), ["z.safetensors: the file is not in the manifest"]),
    "an empty shard": (lambda f: save_file({}, first_shard(f)), ["model-00001-of-", " is missing"]),
    "a shard twice": (lambda f: shutil.copy(first_shard(f), max(f.glob("*.safetensors"))), ["is not in the manifest, but in model-00001"]),
    "config": (lambda f: (f / "config.json").write_text("{}"), ["config.json: the file has other bytes"]),
    "template": (lambda f: (f / "chat_template.jinja").unlink(), ["chat_template.jinja: the file is missing"]),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json: the file is not in the manifest"]),
    "dtype": (lambda f: edit(f, lambda c: c["tensors"][NORM].update(dtype="I32")), [f"{NORM} is F32 (64,) at byte", "not I32 (64,)"]),
    "forgotten": (lambda f: edit(f, lambda c: c["tensors"].pop(NORM)), [f": {NORM} is not in the manifest"]),
    "invented": (lambda f: edit(f, lambda c: c["tensors"].update(more=c["tensors"][NORM])), [": more is missing"]),
    "no manifest": (lambda f: (f / "megabridge.json").unlink(), ["CheckpointError", "must hold megabridge.json"]),
    "format": (lambda f: edit(f, lambda c: c.update(format=7)), ["CheckpointError", "format 1, not 7"]),
    "fields": (lambda f: edit(f, lambda c: c["tensors"][NORM].pop("shape")), ["CheckpointError", "KeyError('shape')"]),
    "path": (lambda f: edit(f, lambda c: c["tensors"][NORM].update(file="../x")), ["CheckpointError", "the file name '../x'"]),
    "case": (lambda f: edit(f, lambda c: c["files"].update({"Config.JSON": c["files"]["config.json"]})),
             ["CheckpointError", "the file names 'config.json' and 'Config.JSON'"]),
    "a pipe": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), ["config.json", "must be a file, not a pipe"]),
    "a link out": (lambda f: outside(f, "config.json"), ["config.json", "must lie inside its folder"]),
    "weights out": (lambda f: outside(f, first_shard(f).name), ["model-00001-of-", "must lie inside its folder"]),
    "its manifest out": (lambda f: outside(f, "megabridge.json"), ["CheckpointError", "must lie inside its folder"]),
}  # fmt: skip


def outside(folder: Path, name: str) -> None:
    """The file `name` lies beside the folder, and a link leads there."""
    place = folder.with_name(f"{folder.name} {name}")
    (folder / name).rename(place)
    (folder / name).symlink_to(place)


ADDED: dict[str, Callable[[Path], object]] = {
    **{
        name: lambda path: path.write_bytes(b"x")
        for name in (
            "modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "adapter_config.json",
            "adapter_model.safetensors", "tokenizer.json", "vocab.txt", "model.gguf", "tf_model.h5", "notes.txt", "readme.md",
            ".cache/other", "original/consolidated.00.pth", "additional_chat_templates/x.jinja", "deep/er/x.so",
        )
    },
    "empty": Path.mkdir,
    "chat": lambda path: path.symlink_to("chat_template.jinja"),
    "README.md": lambda path: path.symlink_to("config.json"),
    "NOTICE": lambda path: path.mkdir(),
    "elsewhere": lambda path: path.symlink_to(path.parent.parent),
    "special_tokens_map.json": os.mkfifo,
}  # fmt: skip


def test_what_was_added_is_named(ranks: RankServer, out: Path, tmp_path: Path) -> None:
    more, sound, hub = (Path(shutil.copytree(out, tmp_path / name)) for name in ("more", "sound", "hub"))
    for name, make in ADDED.items():
        put(more, [name], make)
    put(sound, HARMLESS)
    (tmp_path / "other name").hardlink_to(sound / "config.json")
    (sound / "chat_template.jinja").rename(sound / ".git/template")
    (sound / "chat_template.jinja").symlink_to(".git/template")
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(hub.iterdir()):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    folders = [str(folder) for folder in (more, sound, snapshot)]
    ((lines, *others),) = ranks.run(f"{CASES}:checked", topology=Topology(), kwargs={"folders": folders})
    kinds = {"empty": "folder", "NOTICE": "folder", "chat": "link", "README.md": "link", "elsewhere": "link"}
    kinds["special_tokens_map.json"] = "pipe"
    assert sorted(lines) == sorted(f"{name}: the {kinds.get(name, 'file')} is not in the manifest" for name in ADDED)
    assert others == [[], []]


def test_fault_11_every_damage_is_named(ranks: RankServer, out: Path, tmp_path: Path) -> None:
    damaged = []
    for name, (damage, _) in DAMAGE.items():
        damaged.append(shutil.copytree(out, tmp_path / name))
        damage(damaged[-1])
    (shutil.copytree(out, tmp_path / "sound") / "README.md").write_text("A model card is no damage.")
    folders = [str(folder) for folder in [*damaged, tmp_path / "sound"]]
    first, second = ranks.run(f"{CASES}:checked", topology=Topology(dp=2), kwargs={"folders": folders})
    assert first == second, "ranks share the work and know all of it"
    for (name, (_, parts)), lines in zip(DAMAGE.items(), first, strict=False):
        text = "\n".join(lines)
        assert all(part in text for part in parts), f"{name}: {text}"
        if not text.startswith("CheckpointError") and name not in ("an empty shard", "a shard twice"):
            assert len(lines) == (2 if name in ("two tensors", "swapped") else 1), f"{name}: {text}"
    assert first[-1] == []


def test_a_folder_against_its_source(ranks: RankServer, out: Path, source: Path, tmp_path: Path) -> None:
    other = changed_model(source, tmp_path / "other", lambda x: (x[NORM].add_(1), x.pop(QKV)))
    longer = changed_model(
        source,
        tmp_path / "longer",
        lambda x: x.update({QKV: x[QKV][:-1].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}),
    )
    pairs = [(out, source), (out.with_name("bf16"), source), (out.with_name("bf16"), other), (other, out), (out, longer)]
    pairs.append((out, out.with_name("bf16")))
    (seen,) = ranks.run(
        f"{CASES}:checked_against", topology=Topology(), kwargs={"pairs": [tuple(map(str, pair)) for pair in pairs]}
    )
    assert seen[:2] == [[], []]
    assert seen[2] == [f"{QKV} is not in the source", f"{NORM} has other values, as torch.bfloat16"]
    assert seen[3] == [f"{QKV} is missing", f"{NORM} has other values, as torch.float32"]
    rows, columns = load_file(source / "model.safetensors")[QKV].shape
    assert seen[4] == [f"{QKV} is ({rows}, {columns}), not ({rows - 1}, {columns})"]
    assert len(seen[5]) > 20, "float32 weights aren't bfloat16 ones cast back"


def test_the_command_prints_every_mismatch_and_fails(ranks: RankServer, out: Path, source: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(out, tmp_path / "folder")
    names = [name for name in find_tensors(folder) if "layers" in name]
    for name in names:
        flip(folder, name, 1)
    edit(folder, lambda content: content["files"].update({"\x1b[2J": content["files"]["config.json"]}))
    command = ["recipe=convert", "conversion.mode=verify", f"conversion.folder={folder}", f"conversion.source={source}"]
    done = ranks.program([*command, f"run_dir={tmp_path / 'run'}", "model=tiny_llama", "logger=local"], cwd=tmp_path)
    assert done.returncode != 0
    for name in names:
        assert f": {name} has other bytes than were written\n" in done.stdout
        assert f"\n{name} has other values, as torch.float32\n" in done.stdout
    assert "\\x1b[2J: the file is missing\n" in done.stdout and "\x1b" not in done.stdout
    assert len(names) > 20 and f"differs in {2 * len(names) + 1} places" in done.stderr
