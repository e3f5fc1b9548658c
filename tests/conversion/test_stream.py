"""Streaming: the same tensors as an export's files, moved in buckets between real ranks, and ended in every way."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabridge.hf.tensor_files import find_tensors
from megabridge.mapping import natural
from megabridge.parallel.topology import Topology
from tests.support.covering import further
from tests.support.models import TINY, llama_config
from tests.support.payload import identical, payload
from tests.support.rank_server import RankServer
from tests.support.stream_checks import check_tasks, files

SEEDS = [1, 2, 3]
TIED = {**TINY, "tie_word_embeddings": True}
LIMIT = 10.0  # seconds for any early end


@pytest.fixture(scope="module")
def models(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random shapes, and a tied model whose file carries the head as well."""
    root = tmp_path_factory.mktemp("models")
    configs = {**{str(seed): llama_config(seed) for seed in SEEDS}, "tied": TIED, "plain": TIED}
    ranks.run("tests.support.stream:write_models", kwargs={"root": root, "configs": configs})
    tied = root / "tied"
    tensors = load_file(tied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    return [*(root / str(seed) for seed in SEEDS), tied]


@pytest.mark.parametrize(
    "layout",
    [Topology(tp=2, pp=2), *further(Topology(), Topology(tp=4), Topology(pp=2, vpp=2), Topology(tp=2, dp=2))],
    ids=str,
)
def test_the_tensors_of_the_files(ranks: RankServer, models: list[Path], layout: Topology) -> None:
    results = ranks.run("tests.support.stream:streams", topology=layout, kwargs={"sources": [str(model) for model in models]})
    last = layout.world_size - 1
    for number, source in enumerate(models):
        expected = files(source)
        by_name = {entry[0]: entry for entry in expected}
        for rank, seen in enumerate(result[number] for result in results):
            assert seen["whole"] == seen["small"] == seen["buckets"] == expected
            assert seen["single"] == (expected if rank == last else [])
            assert seen["some consumers"] == (expected if rank in (0, last) else [])
            assert seen["some"] == [by_name[name] for name in seen["some names"]] and len(seen["some"]) >= len(expected) // 2
            aliases = {"lm_head.weight"} if source.name == "tied" else set()
            assert sorted(seen["shards"]) == sorted(entry for entry in expected if entry[0] not in aliases)
            check_bf16(source, seen["bf16"])
            check_tasks(seen["tasks"], expected, layout)
        for place in range(len(expected)):
            holders = [rank for rank, result in enumerate(results) if result[number]["live"][place]]
            assert set(results[0][number]["tasks"][place][5]) <= set(holders)


def check_bf16(source: Path, seen: list[Any]) -> None:
    tensors = load_file(source / "model.safetensors")
    for name, dtype, shape, digest in seen:
        bits = tensors[name].bfloat16().flatten().view(torch.uint8).numpy().tobytes()
        assert (dtype, shape, digest) == ("torch.bfloat16", tuple(tensors[name].shape), hashlib.sha256(bits).hexdigest())


def test_only_tensors_travel_and_the_next_bucket_is_ahead(ranks: RankServer, models: list[Path]) -> None:
    for seen in ranks.run("tests.support.stream:exchanges", topology=Topology(tp=2, pp=2), kwargs={"source": str(models[-1])}):
        count = len(seen["buckets"])
        assert count >= 4 and sum(seen["buckets"]) == len(find_tensors(models[-1]))
        assert seen["starting"] == {"all_gather_object": 2, "all_reduce": 2}, (
            "the cached plan, a digest; the arguments are legal, twice"
        )
        assert seen["running"].keys() == {"all_reduce", "broadcast"} and seen["running"]["all_reduce"] == count + 1
        assert count <= seen["running"]["broadcast"] <= 4 * count, "at most one for each source and bucket"
        assert seen["first"]["all_reduce"] == 2 and seen["first"]["broadcast"] >= 2, "two buckets were sent when one was yielded"


@pytest.mark.parametrize("layout", [Topology(tp=2, dp=2), Topology(pp=2)], ids=str)
def test_the_plan_survives_steps_and_new_storage(ranks: RankServer, models: list[Path], tmp_path: Path, layout: Topology) -> None:
    kwargs = {"source": str(models[-1]), "out": str(tmp_path)}
    for looks in ranks.run("tests.support.stream:changed", topology=layout, kwargs=kwargs):
        assert looks == [files(tmp_path / str(number)) for number in range(1, 5)]
        assert len({tuple(look) for look in looks}) == 4, "each change must show"
        assert looks[0] == files(models[-1])


def test_early_ends(ranks: RankServer, models: list[Path]) -> None:
    seen = ranks.run("tests.support.stream:endings", topology=Topology(tp=2, pp=2), kwargs={"source": str(models[-1])})
    total = len(find_tensors(models[-1]))
    messages = {name: [rank[name][0] for rank in seen] for name in seen[0]}
    counts = {name: [rank[name][1] for rank in seen] for name in seen[0]}
    assert all(rank[name][2] < LIMIT for rank in seen for name in rank)
    quiet = "nothing was raised"

    def closed(rank: int, count: int) -> str:
        return f"MegabridgeError: rank {rank} closed the stream after {count} of {total} tensors"

    def others(name: str, rank: int, part: str) -> None:
        for number, message in enumerate(messages[name]):
            assert message == quiet if number == rank else message.startswith(part), f"{name}: {messages[name]}"

    others("closed", 1, closed(1, 1))
    others("closed in the third last bucket", 1, closed(1, counts["closed in the third last bucket"][1]))
    for name in ("closed in the last bucket but one", "closed in the last bucket", "closed after the last"):
        assert messages[name] == [quiet] * 4 and all(counts[name][rank] == total for rank in (0, 2, 3)), name
    assert messages["closed by all"] == [quiet] * 4 and counts["closed by all"] == [5] * 4
    assert messages["closed by the consumer"] == [quiet] * 4 and counts["closed by the consumer"] == [0, 0, 2, 0]
    assert [message.startswith(closed(0, 2)) for message in messages["closed by one consumer"]] == [False, False, True, False]
    others("dropped unused", 3, closed(3, 0))
    assert counts["dropped unused"] == [0] * 4
    others("collected", 1, closed(1, counts["collected"][1]))
    others("raised in the loop", 2, closed(2, 3))
    others("held", 0, closed(0, 2))
    assert messages["landing the last"] == [quiet, "own MemoryError: no memory left", quiet, quiet], "the others have it all"
    assert [counts["landing the last"][rank] for rank in (0, 2, 3)] == [total] * 3
    for name in ("packing", "packing the first", "joining", "joining the last"):
        assert messages[name][1] == "own MemoryError: no memory left"
        for rank in (0, 2, 3):
            assert messages[name][rank].startswith(
                "MegabridgeError: rank 1 failed while streaming weights: MemoryError: no memory left"
            ), name
    assert all(
        message.startswith("ConfigError: conversion_tasks, weight_dtype") and "rank 2" in message
        for message in messages["dtypes differ"]
    )
    assert all("bucket_bytes=0 must be" in message and message.startswith("ConfigError") for message in messages["bucket size"])
    assert all("consumers=[4] must name one or more of the ranks 0 to 3" in message for message in messages["consumers"])
    assert counts["whole again"] == [total] * 4


def test_memory_is_two_buckets_and_a_tensor(ranks: RankServer) -> None:
    config = {**TINY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 1024}
    bucket = 8 << 20
    for growth, largest, total in ranks.run(
        "tests.support.stream:peak", topology=Topology(tp=2), kwargs={"config": config, "bucket_bytes": bucket}
    ):
        assert total > 10 * bucket
        assert growth <= 2 * bucket + largest + (6 << 20), f"{growth / 2**20:.1f} MiB"


def test_tasks_of_another_checkpoint(ranks: RankServer, models: list[Path], tmp_path: Path) -> None:
    """They bring its dtypes and its tied copy."""
    plain = models[-1].parent / "plain"
    other = tmp_path / "other"
    other.mkdir()
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16()
        for name, tensor in load_file(models[-1] / "model.safetensors").items()
    }
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_text((plain / "config.json").read_text())
    kwargs = {"source": str(plain), "hf_path": str(other)}
    for seen in ranks.run("tests.support.stream:other_checkpoint", topology=Topology(tp=2), kwargs=kwargs):
        names = [(name, str(tensors[name].dtype)) for name in sorted(tensors, key=natural)]
        assert seen["tasks"] == names and "lm_head.weight" in tensors
        assert [entry[:2] for entry in seen["streamed"]] == names
        assert "nothing" in seen["refusal"] and "(3,) is not a tensor of this model" in seen["refusal"]
        assert "is given twice" in seen["refusal"] and seen["refusal"].startswith("ConfigError: conversion_tasks must be")
        assert seen["dtype"].startswith("ConfigError: dtype='int3'") and seen["none"] == []


@pytest.mark.parametrize("layout", [Topology(tp=4), Topology(pp=2, vpp=2, dp=2)], ids=str)
def test_a_gathered_export_is_the_shared_one(ranks: RankServer, models: list[Path], tmp_path: Path, layout: Topology) -> None:
    """Also where large tensors travel in blocks of rows; ranks other than 0 write nothing."""
    kwargs = {"sources": [str(model) for model in models], "out": str(tmp_path), "bucket_bytes": 3000}
    for rank, reports in enumerate(ranks.run("tests.support.stream:gathered", topology=layout, kwargs=kwargs)):
        for number, report in enumerate(reports):
            assert report["copied"][0] == report["copied"][1] and report["verified"] and report["mismatched"] == ()
            assert report["mine"] == ([str(known) for known in range(number + 1)] if rank == 0 else [])
    for number, source in enumerate(models):
        assert identical(tmp_path / "shared" / str(number), tmp_path / "rank0" / str(number))
        assert number == 1 or payload(tmp_path / "rank0" / str(number)) == payload(source)


def test_a_gathered_export_fails_on_all_ranks_and_publishes_nothing(ranks: RankServer, models: list[Path], tmp_path: Path) -> None:
    kwargs = {"source": str(models[-1]), "out": str(tmp_path)}
    results = ranks.run("tests.support.stream:gathered_failures", topology=Topology(tp=2, dp=2), kwargs=kwargs)
    expected = {
        "damaged file": "ParityError: these tensors differ from the model after the export; nothing was published:\n  model.norm.weight",
        "other replica": "ParityError: these tensors differ from the model after the export; nothing was published:\n  model.layers.0.self_attn.o_proj.weight",
        "full": "No space left on device",
        "packing": "MemoryError: no memory left",
        "writer": "ConfigError: writer='carrier pigeon' must be one of shared, gather",
    }
    for seen in results:
        for name, part in expected.items():
            assert part in seen[name][0] and not seen[name][1], f"{name}: {seen[name]}"
    assert "rank 0 failed while writing weights" in results[3]["full"][0]
    assert "rank 2 failed while streaming weights" in results[0]["packing"][0]
