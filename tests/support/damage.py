"""What the ranks of tests/native/test_digests.py run: native checkpoints in which something is not what was saved."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megabridge.errors import CheckpointError
from megabridge.native import checkpoint, digests, reader
from tests.support import tiny
from tests.support.bridge import refusal

Damage = Callable[[Path, Path], None]
"""Spoils the first folder, where the second is of another step of the same run."""


def flip(folder: Path, name: str) -> None:
    """Flips a bit of the first stored box of `name`: in the elements of a tensor, anywhere in an object."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn.startswith(name))
    with (folder / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        box = file.read(place.length)
        held = torch.load(io.BytesIO(box), weights_only=True)
        elements = held.untyped_storage().tolist() if isinstance(held, torch.Tensor) else list(box)
        at = place.offset + box.index(bytes(elements)) + len(elements) // 2
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
    """Changes the record of digests; with `seal` its own digest too, as if it had been written so."""
    content = json.loads((folder / digests.FILE).read_text())
    change(content)
    if seal:
        del content["xxh3_128"]
        content["xxh3_128"] = digests._own(content)
    (folder / digests.FILE).write_text(json.dumps(content))


def _lose(content: dict[str, Any]) -> None:
    boxes = next(iter(content["boxes"].values()))
    boxes.pop(next(iter(boxes)))


def _copy(*names: str) -> Damage:
    def damage(folder: Path, other: Path) -> None:
        for name in names:
            shutil.copy(other / name, folder / name)

    return damage


def foreign(folder: Path) -> None:
    """Takes away all that says that there were digests."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for name in [name for name in metadata.state_dict_metadata if name.startswith(reader.SAVE)]:
        del metadata.state_dict_metadata[name]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / digests.FILE).unlink()


DAMAGES: Mapping[str, Damage] = {
    "none": lambda folder, other: None,
    "weight": lambda folder, other: flip(folder, "decoder.layers.mlp.linear_fc1.weight"),
    "norm": lambda folder, other: flip(folder, "decoder.final_layernorm.weight"),
    "master": lambda folder, other: flip(folder, "optimizer.state.param."),
    "moment": lambda folder, other: flip(folder, "optimizer.state.exp_avg_sq."),
    "common": lambda folder, other: flip(folder, "common_state"),
    "another step's file": _copy("__0_0.distcp"),
    "another step's metadata": _copy(".metadata"),
    "another step's digests": _copy(digests.FILE),
    "another step's metadata and digests": _copy(".metadata", digests.FILE),
    "no digests": lambda folder, other: (folder / digests.FILE).unlink(),
    "a changed digest": lambda folder, other: rewrite(folder, lambda content: content["files"].clear(), seal=False),
    "no JSON": lambda folder, other: os.truncate(folder / digests.FILE, 100),
    "of no save": lambda folder, other: rewrite(folder, lambda content: content.update(save="other"), seal=True),
    "a box without": lambda folder, other: rewrite(folder, _lose, seal=True),
    "a bit of the metadata": lambda folder, other: _flip_metadata(folder),
    "the marker": lambda folder, other: os.truncate(folder / "metadata.json", 2),
}


def _flip_metadata(folder: Path) -> None:
    content = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(content.replace(b"decoder.final_layernorm", b"decoder.final_layernorn", 1))


def loads(native_folder: str, other: str, scratch: str, *, with_optimizer: bool = True) -> dict[str, str]:
    """What a load of each damaged copy raises, with the optimizer or of the weights alone; and what was in a parameter before."""
    folder = Path(scratch) / "native"
    trainer = tiny.trainer(tiny.config(scratch, steps=100))
    said = {}
    for name, damage in DAMAGES.items():
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(native_folder, folder)
            damage(folder, Path(other))
        dist.barrier()
        norm = _norm(trainer.chunks)
        if norm is not None:
            norm.fill_(7.0)
        if with_optimizer:
            said[name] = refusal(lambda: checkpoint.load(folder, trainer.chunks, optimizer=trainer.optimizer))
        else:
            said[name] = refusal(lambda: checkpoint.load_weights(folder, trainer.chunks))
        if name == "norm":
            assert norm is None or bool((norm == 7.0).all()), "what is wrong is copied nowhere"
        dist.barrier()
    return said


def _norm(chunks: list[Any]) -> torch.Tensor | None:
    return next(
        (p.data for chunk in chunks for name, p in chunk.named_parameters() if name.endswith("final_layernorm.weight")), None
    )


def without_digests(native_folder: str, scratch: str) -> list[str]:
    """Another program's folder: as it is, with a flipped bit in a weight, and with objects that end an unpickler."""
    folder = Path(scratch) / "foreign"
    chunks = tiny.model()
    shutil.copytree(native_folder, folder)
    foreign(folder)
    said = [refusal(lambda: checkpoint.load_weights(folder, chunks))]
    flip(folder, "decoder.layers.mlp.linear_fc1.weight")
    said.append(refusal(lambda: checkpoint.load_weights(folder, chunks)))
    whole = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(bytes(len(whole)))
    try:
        checkpoint.load_weights(folder, chunks)
    except Exception as error:  # torch's own is none
        said.append(f"{type(error).__name__}: {error}")
        assert isinstance(error, CheckpointError)
    loads, torch.load = torch.load, _interrupted
    try:
        checkpoint.load_weights(folder, chunks)
    except KeyboardInterrupt:
        said.append("interrupted")
    finally:
        torch.load = loads
    return said


def _interrupted(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt
