"""Headers and indexes are not trusted: whatever is wrong is refused by name before a tensor is touched."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabridge.conversion.file_writer import Writer
from megabridge.conversion.read_loop import ReadTask, fill, run_tasks, silent
from megabridge.errors import CheckpointError
from megabridge.hf import tensor_files
from megabridge.hf.safetensors_format import DTYPES, MAX_HEADER, build_header, read_header
from megabridge.hf.tensor_files import Reader, Way, find_tensors, native_box
from megabridge.mapping import Cut, Dims, Fuse, Same, transfers

SIZES = Dims(num_layers=1, hidden_size=1, num_attention_heads=4, num_query_groups=2, vocab_size=1, tied=False)


def write(path: Path, header: Any, payload: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_files_of_the_reference_library(tmp_path: Path) -> None:
    tensors = {f"t.{i}": torch.arange(24).to(dtype).reshape(2, 3, 4) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    infos = find_tensors(tmp_path)
    with Reader(infos.values()) as reader:
        for name, tensor in tensors.items():
            assert infos[name].dtype == tensor.dtype
            assert reader.mapped(infos[name]).tolist() == tensor.tolist()


def test_the_reference_library_reads_our_files(tmp_path: Path) -> None:
    tensors = {"ä": torch.randn(3, 4).bfloat16(), "b": torch.randn(5), "c": torch.empty(0, 2)}
    header, offsets = build_header([(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()])
    payload = b"".join(t.view(torch.uint8).numpy().tobytes() for t in tensors.values())
    (tmp_path / "f.safetensors").write_bytes(header + payload)
    read = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(read[name], t) for name, t in tensors.items())
    assert [info.start for info in read_header(tmp_path / "f.safetensors").values()] == offsets


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        (b"{" * 200_000, b"", "valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"", "nested too deeply"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", "'a' appears twice"),
        ([], b"", "must be a JSON object"),
        ({"a": 3}, b"", "exactly dtype, shape and data_offsets"),
        ({"a": entry(0, 4, [1], "F31")}, b"1234", "'F31'"),
        ({"a": entry(0, 4, [-1])}, b"1234", "[-1]"),
        ({"a": entry(0, 4, [True])}, b"1234", "[True]"),  # type: ignore[list-item]
        ({"a": entry(0, 4, [2])}, b"1234", "8 bytes for F32 [2]"),
        ({"a": entry(0, 4, [1], "F64")}, b"1234", "8 bytes for F64 [1]"),
        ({"a": entry(4, 8, [1])}, b"12345678", "must begin at byte"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, b"12345678", "'b' must begin at byte"),
        ({"a": entry(0, 2**62, [2**60])}, b"1234", "by its header"),
        ({"a": entry(0, 4, [1])}, b"123", "truncated"),
        ({"a": entry(0, 4, [1])}, b"12345", "longer"),
        ({"a": entry(0, 4, [1] * 65)}, b"1234", "at most 64 sizes"),
        ({"a": entry(0, 4, [2**63])}, b"1234", "sizes from 0"),
        ({"a": entry(0, 4, [2**62] * 64)}, b"1234", "bytes for F32"),
        ({"a": entry(0, 4, [10**4000])}, b"1234", "sizes from 0"),
        (b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,4]}}', b"1234", "valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"2," * 2_000_000 + b'2],"data_offsets":[0,4]}}', b"1234", "at most 64 sizes"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode("utf-16"), b"1234", "valid JSON"),
        ({"__metadata__": {"format": 3}}, b"", "__metadata__"),
    ],
)  # fmt: skip
def test_fault_12_13_damaged_headers(tmp_path: Path, header: Any, payload: bytes, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, payload)
    begin = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        find_tensors(tmp_path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (2**63).to_bytes(8, "little"), (MAX_HEADER + 1).to_bytes(8, "little") + b"{}"]
)
def test_fault_13_header_lengths_outside_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="must begin with a header inside the file"):
        find_tensors(tmp_path)


def sharded(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.ones(2)}, folder / "two.safetensors")
    text = weight_map if isinstance(weight_map, bytes) else json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)
    return folder


def test_a_sharded_folder(tmp_path: Path) -> None:
    assert set(find_tensors(sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}))) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (b"{", "valid JSON"),
        (b'{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "appears twice"),
        ({}, "must have a weight_map"),
        ({"a": 3}, "must have a weight_map"),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "must exist"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "the index puts 'b' in one.safetensors, which lacks it"),
        ({"a": "one.safetensors"}, ""),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "the index puts 'c'"),
        ({"a": "one.safetensors", "b": "../two.safetensors"}, "plain name"),
        ({"a": "one.safetensors", "b": "/etc/passwd"}, "plain name"),
        ({"a": "one.safetensors", "b": "..\\two.safetensors"}, "plain name"),
        ({"a": "one.safetensors", "b": "two\0.safetensors"}, "plain name"),
        ({"a": "one.safetensors", "b": "link.safetensors"}, "must lie inside its folder"),
        ({"a": "one.safetensors", "b": "circle.safetensors"}, "must exist"),
        ({"a": "one.safetensors", "b": "folder.safetensors"}, "must be a file"),
        ({"a": "one.safetensors", "b": "x" * 300}, "must exist"),
        ({"a": "one.safetensors", "b": "\ud800"}, "must exist"),
    ],
)
def test_fault_14_15_damaged_indexes(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": torch.ones(2)}, tmp_path / "outside.safetensors")
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "folder.safetensors").mkdir()
    sharded(folder, weight_map)
    if not message:  # a shard that the index doesn't name isn't part of the model
        assert set(find_tensors(folder)) == {"a"}
        return
    with pytest.raises(CheckpointError) as caught:
        find_tensors(folder)
    assert message in str(caught.value)


def test_fault_14_tensors_that_the_index_forgot_are_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"a": "one.safetensors"})
    save_file({"a": torch.ones(2), "extra": torch.ones(1)}, folder / "one.safetensors")
    with pytest.raises(CheckpointError, match="holds 'extra', but the index doesn't list it"):
        find_tensors(folder)


def test_fault_14_shards_that_the_index_doesnt_name(tmp_path: Path) -> None:
    """Shards of another download, or an index of another model: nothing is taken from a folder on suspicion."""
    folder = sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    save_file({"c": torch.ones(2)}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model-00003-of-00003\.safetensors lies in the folder, but the index doesn't name it"
    ):
        find_tensors(folder)


def test_links_into_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))
    assert set(find_tensors(snapshot)) == {"a"}


def test_fault_22_other_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"it has pytorch_model\.bin"):
        find_tensors(tmp_path)


@pytest.mark.parametrize("cut", [None, *(Cut(d, s, n, i) for d, s, n in ((0, 1, 2), (0, 1, 4), (1, 1, 3)) for i in range(n))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["mapped", "sequential"])
@pytest.mark.parametrize("long", [1, 32 << 10])
def test_boxes_are_read_and_written_back(
    tmp_path: Path, cut: Cut | None, dtype: torch.dtype, way: Way, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One share is read, changed and written: the file has exactly the share's elements changed. `long` 1: all by position."""
    monkeypatch.setattr(tensor_files, "LONG", long)
    monkeypatch.setattr(tensor_files, "PIECE", 64)  # bytes: every box is read in several parts
    layout = Fuse("num_query_groups", ("heads_per_group", 1, 1))
    parts = [torch.randn(rows, 6) for rows in (16, 8, 8)]
    names = ["q", "k", "v"]
    header, _ = build_header([(name, p.dtype, tuple(p.shape)) for name, p in zip(names, parts, strict=True)])
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"".join(p.numpy().tobytes() for p in parts))
    infos = find_tensors(tmp_path)
    shape = [32, 6]
    if cut is not None:
        shape[cut.dim] //= cut.size
    target = torch.full(shape, torch.nan, dtype=dtype)
    moves = transfers(layout, (32, 6), SIZES, (cut,) if cut else ())
    with Reader(infos.values(), way=way) as reader:
        jobs = [ReadTask(infos[names[move.part]], move, target) for move in moves]
        run_tasks(reader, jobs, fill, straight=True, limit=64, progress=silent)
        assert reader.bytes_copied == target.numel() * 4
    assert not target.isnan().any()
    for move in moves:
        want = native_box(target, move)
        got = parts[move.part].as_strided(*(lambda g: (g[0], g[1], g[2]))(move.hf_view()))
        assert torch.equal(want, got.to(dtype))
    with Writer() as writer:
        for move in moves:
            writer.write(infos[names[move.part]], (move,), -target)
        writer.sync()
    after = load_file(path)
    changed = sum(int((after[name] == -part.to(dtype).float()).sum()) for name, part in zip(names, parts, strict=True))
    kept = sum(int((after[name] == part).sum()) for name, part in zip(names, parts, strict=True))
    assert changed == target.numel() and kept == sum(p.numel() for p in parts) - target.numel()


def test_fault_25_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4096)}, tmp_path / "model.safetensors")
    infos = find_tensors(tmp_path)
    (move,) = transfers(Same(), (4096,), SIZES, ())
    with Reader(infos.values()) as reader:
        run_tasks(reader, [ReadTask(infos["a"], move, torch.empty(4096))], fill, straight=True, progress=silent)
        with (tmp_path / "model.safetensors").open("r+b") as stream:
            stream.truncate(100)
        with pytest.raises(CheckpointError, match="changed while being read"):
            reader.finish()
        with pytest.raises(CheckpointError, match="changed while being read"):
            run_tasks(reader, [ReadTask(infos["a"], move, torch.empty(4096))], fill, straight=True, progress=silent)
        with pytest.raises(CheckpointError, match="changed while being read"):
            reader.mapped(infos["a"])
