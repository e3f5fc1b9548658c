"""Imports: every way of reading gives the same bits, what is copied and fetched is counted, a node reads a file once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megabridge.conversion import shared_reads
from megabridge.conversion.read_loop import ReadTask, fill, run_tasks, silent
from megabridge.conversion.shared_reads import SharedReads, blocks_of, inside
from megabridge.errors import CheckpointError, ConfigError
from megabridge.hf.contiguous_runs import contiguous_runs
from megabridge.hf.tensor_files import Reader, find_tensors, native_box, view
from megabridge.mapping import Cut, Dims, Fuse, Same, transfers
from megabridge.parallel.topology import Topology
from megabridge.storage.file_systems import kind_of, parse_mounts
from tests.support.models import TINY
from tests.support.rank_server import RankServer

DIMS = Dims(num_layers=1, hidden_size=1, num_attention_heads=4, num_query_groups=2, vocab_size=1, tied=False)
LARGER = {**TINY, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 257, "num_hidden_layers": 2}
CUTS = [None, *(Cut(dim, stride, 2, index) for dim, stride, index in product((0, 1), (1, 2), (0, 1)))]


def test_every_way_of_reading_gives_the_same_bits(ranks: RankServer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": source, "config": LARGER})
    payload = sum(info.nbytes for info in find_tensors(source).values())
    for layout in (Topology(tp=2, pp=2), Topology(tp=2, dp=2)):
        seen = ranks.run("tests.support.imports:ways", topology=layout, kwargs={"source": str(source)})
        for rank, (mapped, sequential, dedupe) in enumerate(seen):
            assert mapped["digest"] == sequential["digest"] == dedupe["digest"]
            for way in (mapped, sequential, dedupe):
                assert way["copied"][rank] == way["owned"], "a rank copies what it owns"
                assert way["verified"] and not way["left"]
                assert way["largest"] <= 8 << 20, "positioned reads are split"
                assert len(way["fetched"]) == 1 and payload <= way["fetched"][0] <= payload + 8 * 4096, "one node, every page once"
        copies = 2 if layout.dp == 2 else 1
        assert sum(rank[2]["read"] for rank in seen) == payload, "the node's ranks read the payload once between them"
        assert all(rank[2]["read"] < 0.45 * payload for rank in seen), "and share the reading"
        assert sum(rank[0]["owned"] for rank in seen) >= copies * payload


def test_a_failing_shared_read_fails_on_every_rank(ranks: RankServer, tmp_path: Path) -> None:
    source = tmp_path / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": source, "config": LARGER})
    seen = ranks.run("tests.support.imports:shared_read_fails", topology=Topology(tp=2, pp=2), kwargs={"source": str(source)})
    for rank, errors in enumerate(seen):
        for kind, message, seconds in errors:
            assert kind == "CheckpointError" and seconds < 10
            assert "model.safetensors failed: Input/output error" in message
            assert rank == 1 or message.startswith("rank 1 failed while reading weights")


def test_an_import_needs_little_memory_beside_the_model(ranks: RankServer, tmp_path: Path) -> None:
    """Anonymous memory, sampled: straight into parameters, cast, by rows, compared and checked, by eight threads."""
    for way in ranks.run("tests.support.imports:memory", kwargs={"root": str(tmp_path)})[0]:
        assert 0 <= way["extra"] <= 64 << 20 and way["model"] > 140_000_000, way


def write_parts(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {
        "q": torch.randn(16, 8),
        "k": torch.randn(8, 8),
        "v": torch.randn(8, 8),
        "one": torch.tensor(1.5),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("limit", [4, 24, 100, 1 << 20])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_blocks_and_the_boxes_inside_them(tmp_path: Path, cut: Cut | None, limit: int) -> None:
    """Blocks tile the payload; the parts of a box that lie in them fill the same elements as the box."""
    tensors = write_parts(tmp_path)
    infos = find_tensors(tmp_path)
    blocks = blocks_of(infos, limit)
    assert all(block.stop - block.start <= limit for block in blocks)
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert sum(block.stop - block.start for block in blocks) == sum(info.nbytes for info in infos.values())
    shape = [32, 8]
    if cut is not None:
        shape[cut.dim] //= cut.size
    target, count = torch.full(shape, torch.nan), torch.zeros(shape)
    for move in transfers(Fuse("num_query_groups", ("heads_per_group", 1, 1)), (32, 8), DIMS, (cut,) if cut else ()):
        name = "qkv"[move.part]
        for block in blocks:
            for piece, ranges in block.pieces:
                for part in inside(move, ranges) if piece == name else ():
                    native_box(target, part).copy_(view(tensors[name], part.hf_view()))
                    native_box(count, part).add_(1)
        assert torch.equal(native_box(target, move), view(tensors[name], move.hf_view()))
    assert (count == 1).all()


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_stretches_are_maximal_and_complete(cut: Cut | None) -> None:
    shape = [32, 8]
    if cut is not None:
        shape[cut.dim] //= cut.size
    target = torch.arange(shape[0] * shape[1]).view(shape)
    for move in transfers(Fuse("num_query_groups", ("heads_per_group", 1, 1)), (32, 8), DIMS, (cut,) if cut else ()):
        found = contiguous_runs(move, target.stride())
        whole = torch.arange(move.hf_shape[0] * move.hf_shape[1]).view(move.hf_shape)
        ours = [start + n for start in found.native.tolist() for n in range(found.length)]
        theirs = [start + n for start in found.hf.tolist() for n in range(found.length)]
        assert ours == native_box(target, move).flatten().tolist() and theirs == view(whole, move.hf_view()).flatten().tolist()
        joined = [(start + n * found.length, native) for start, natives in found.adjacent() for n, native in enumerate(natives)]
        assert joined == list(zip(found.hf.tolist(), found.native.tolist(), strict=True))
    assert contiguous_runs(transfers(Same(), (32, 8), DIMS, ())[0], (8, 1)).length == 256


def test_a_short_read_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A positioned read may bring less than was asked for, also in the middle of a buffer."""
    tensors = write_parts(tmp_path)
    infos = find_tensors(tmp_path)
    real = os.preadv
    monkeypatch.setattr("megabridge.hf.tensor_files.LONG", 1)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    target = torch.full((32, 8), torch.nan)
    moves = transfers(Fuse("num_query_groups", ("heads_per_group", 1, 1)), (32, 8), DIMS, ())
    with Reader(infos.values()) as reader:
        run_tasks(reader, [ReadTask(infos["qkv"[move.part]], move, target) for move in moves], fill, straight=True, progress=silent)
    assert all(torch.equal(native_box(target, move), view(tensors["qkv"[move.part]], move.hf_view())) for move in moves)


def test_a_thread_that_fails_ends_the_walk(tmp_path: Path) -> None:
    write_parts(tmp_path)
    infos = find_tensors(tmp_path)
    (move,) = transfers(Same(), (16, 8), DIMS, ())

    def fails(*args: object) -> None:
        raise CheckpointError("as it should")

    with Reader(infos.values()) as reader, pytest.raises(CheckpointError, match="as it should"):
        run_tasks(reader, [ReadTask(infos["q"], move, torch.empty(16, 8))] * 50, fails, progress=silent)
    with pytest.raises(ConfigError, match="reader='fast' must be one of auto, mapped, sequential"):
        Reader(infos.values(), way="fast")  # type: ignore[arg-type]


def test_a_node_notices_a_rank_that_died(tmp_path: Path) -> None:
    """The others would wait for its blocks for ever; its lock tells."""
    file = tmp_path / "window"
    file.write_bytes(bytes(shared_reads._PAGE))
    ready, told = os.pipe()
    end, ended = os.pipe()
    program = (
        "import fcntl, os, sys; file, place, told, end = sys.argv[1], *map(int, sys.argv[2:]); fd = os.open(file, os.O_RDWR); "
        "fcntl.lockf(fd, fcntl.LOCK_EX, 1, place); os.write(told, b'x'); os.read(end, 1); os._exit(0)"
    )
    arguments = [sys.executable, "-c", program, str(file), str(shared_reads._LOCKS + 1), str(told), str(end)]
    child = subprocess.Popen(arguments, pass_fds=(told, end))
    os.read(ready, 1)
    fd = os.open(file, os.O_RDWR)
    try:
        counters = shared_reads._Counters(SharedReads((), {}, 0, (4, 7), fd, mmap.mmap(fd, 0)))
        counters.check_alive(total=5)
        os.write(ended, b"x")
        child.wait()
        with pytest.raises(CheckpointError, match="rank 7 died"):
            counters.check_alive(total=5)
    finally:
        for descriptor in (fd, ready, told, end, ended):
            os.close(descriptor)


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /data rw,relatime - nfs4 server:/export rw
31 30 0:26 / /data/local\\040disk rw - xfs /dev/vdb rw
32 22 0:27 / /mnt/s3 rw - fuse.s3fs s3fs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/x", "ext4"),
        ("/data/model", "nfs4"),
        ("/data", "nfs4"),
        ("/database", "ext4"),
        ("/data/local disk/m", "xfs"),
        ("/mnt/s3/a", "fuse.s3fs"),
    ],
)
def test_the_file_system_of_a_folder(folder: str, kind: str) -> None:
    assert kind_of(Path(folder), parse_mounts(MOUNTS)) == kind


def test_network_file_systems_are_read_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)
    infos = find_tensors(tmp_path)
    file = tmp_path / "model.safetensors"
    for kind, way in (
        ("ext4", "mapped"),
        ("nfs4", "sequential"),
        ("fuse.s3fs", "sequential"),
        ("lustre", "sequential"),
        ("tmpfs", "mapped"),
    ):
        monkeypatch.setattr("megabridge.storage.file_systems._mounts", lambda kind=kind: {Path("/"): kind})
        assert Reader(infos.values()).way(file) == way
        assert Reader(infos.values(), way="mapped").way(file) == "mapped"


def test_rules_broken_once_are_detected_and_named(ranks: RankServer, tmp_path: Path) -> None:
    """A wrong name, ratio, grouping or order of parts: refused with the tensor's name, or localised to one of its modules."""
    source = tmp_path / "source"
    config = {**TINY, "num_hidden_layers": 2}
    ranks.run("tests.support.models:write_model", kwargs={"folder": source, "config": config})
    seen = ranks.run(
        "tests.support.imports:broken_rules",
        topology=Topology(tp=2),
        kwargs={"source": str(source), "file": str(tmp_path / "events.pt")},
        timeout=300,
    )[0]
    silent_ones = 0
    for native, mutation, names, message, place in seen:
        where = f"{native}, {mutation}: {message or place}"
        if mutation == "none":
            assert not message and place is None, where
        elif message:
            assert any(name in message for name in names), where
        else:
            silent_ones += 1
            assert place is not None and any(name.startswith(f"{place}.") for name in names), where
    rules = {native for native, *_ in seen}
    assert len(rules) == 13 and len(seen) >= 2 * len(rules) and silent_ones >= 5, (len(rules), len(seen), silent_ones)
