"""Damaged, hostile and contradictory sources are refused by name, on every rank alike, in seconds, before a parameter changes.

The numbers are those of the project's list of faults. One run of two ranks loads every folder; each test reads its part.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabridge.parallel.topology import Topology
from tests.support.models import TINY, changed_model
from tests.support.rank_server import RankError, RankServer

Tensors = dict[str, torch.Tensor]
Seen = dict[str, list[tuple[str, str, float, bool]]]
UP = "model.layers.1.mlp.up_proj.weight"
HEAD = 8 + 2000  # well inside the header of the small model


def rename(tensors: Tensors, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def edited(path: Path, edit: Callable[[bytes], bytes]) -> Path:
    file = path / "model.safetensors"
    file.write_bytes(edit(file.read_bytes()))
    return path


def header_edit(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The header changed, the payload as it was."""

    def rewrite(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return edited(path, rewrite)


def twice(raw: bytes) -> bytes:
    """The header's first tensor stands in it once more."""
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    name, entry = next((name, entry) for name, entry in json.loads(text).items() if name != "__metadata__")
    text = text[:-1] + f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def swap_offsets(header: dict[str, Any]) -> None:
    """Two tensors of one size read each other's bytes twice over: the second takes the first's place too."""
    header[UP]["data_offsets"] = header[UP.replace("up_", "gate_")]["data_offsets"]


def poke(value: float, at: str = UP) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[at].view(-1)[77] = value

    return change


class Payload:
    """What runs when it is unpickled the usual way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def as_bin(path: Path, *, shards: int = 1, extra: dict[str, Any] | None = None) -> Path:
    """The same weights as pytorch_model.bin, or sharded with an index."""
    tensors: dict[str, Any] = {**load_file(path / "model.safetensors"), **(extra or {})}
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    files = {name: f"pytorch_model-{number % shards + 1:05}-of-{shards:05}.bin" for number, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, path / file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return path


def with_code(path: Path, trace: Path) -> Path:
    """A config that asks for code beside it, and for a target of Hydra's kind."""
    (path / "modeling_evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Evil: pass\n")
    (path / "configuration_evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass EvilConfig: pass\n")
    return path


@pytest.fixture(scope="module")
def source(ranks: RankServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "source"
    ranks.run("tests.support.models:write_model", kwargs={"folder": folder, "config": TINY})
    return folder


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a payload would leave if it ran."""
    return tmp_path_factory.mktemp("trace") / "it ran"


def cases(s: Path, root: Path, trace: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each folder by name, with the keywords of its load."""

    def make(name: str, folder: Callable[[Path], Path], **settings: Any) -> tuple[str, dict[str, Any]]:
        return name, {"source": str(folder(root / name)), **settings}

    yield "07 rank 0 only", {"source": [str(changed_model(s, root / "7", lambda x: x.pop(UP))), str(s)]}
    yield make("10 one byte", lambda t: edited(changed_model(s, t), lambda raw: raw[:-1]))
    yield make("10 empty", lambda t: edited(changed_model(s, t), lambda raw: b""))
    yield make("10 to the header", lambda t: edited(changed_model(s, t), lambda raw: raw[:HEAD]))
    yield make("12 wider dtype", lambda t: header_edit(changed_model(s, t), lambda h: h[UP].update(dtype="F64")))
    yield make("12 integer dtype", lambda t: header_edit(changed_model(s, t), lambda h: h[UP].update(dtype="I32")))
    half = lambda x: x.update({k: v.half() for k, v in x.items()})  # noqa: E731
    yield make("12 dtype of its size", lambda t: header_edit(changed_model(s, t, half), lambda h: h[UP].update(dtype="BF16")))
    yield make("12 overlap", lambda t: header_edit(changed_model(s, t), swap_offsets))
    yield make("12 duplicate", lambda t: edited(changed_model(s, t), twice))
    yield make("12 no size", lambda t: header_edit(changed_model(s, t), lambda h: h[UP].update(shape=[0, 64])))
    yield make("13 length", lambda t: edited(changed_model(s, t), lambda raw: (2**63).to_bytes(8, "little") + raw[8:]))
    yield make("16 missing", lambda t: changed_model(s, t, lambda x: (x.pop(UP), x.pop("model.norm.weight"))))
    yield make("16 renamed", lambda t: changed_model(s, t, lambda x: rename(x, UP, UP.replace("up_", "upp_"))))
    yield make("16 no head", lambda t: changed_model(s, t, lambda x: x.pop("lm_head.weight")))
    extra = lambda x: x.update({"model.extra": torch.ones(2)})  # noqa: E731
    yield make("17 extra", lambda t: changed_model(s, t, extra))
    yield make("17 allowed", lambda t: changed_model(s, t, extra), allow_unexpected=["model.ex*"])
    yield make("18 transposed", lambda t: changed_model(s, t, lambda x: x.update({UP: x[UP].t().contiguous()})))
    yield make("18 vocabulary", lambda t: changed_model(s, t, vocab_size=140))
    yield make("18 padded", lambda t: changed_model(s, t, lambda x: x.update({"lm_head.weight": torch.ones(132, 64)})))
    yield make("18 heads", lambda t: changed_model(s, t, num_key_value_heads=8))
    yield make("18 rope", lambda t: changed_model(s, t, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}))
    yield make("19 nan", lambda t: changed_model(s, t, poke(float("nan"))))
    yield make("19 inf", lambda t: changed_model(s, t, poke(float("-inf"), "model.layers.2.self_attn.k_proj.weight")))
    yield make("19 overflow", lambda t: changed_model(s, t, poke(1e30)), dtype="float16")
    yield make("19 unverified", lambda t: changed_model(s, t, poke(float("nan"))), verify=False)
    yield make("19 allowed", lambda t: changed_model(s, t, poke(float("nan"))), allow_nonfinite=True)
    yield make("21 untied head", lambda t: changed_model(s, t, tie_word_embeddings=True))
    yield make("22 not asked for", lambda t: as_bin(changed_model(s, t)))
    yield make("22 single", lambda t: as_bin(changed_model(s, t)), allow_bin=True)
    yield make("22 sharded", lambda t: as_bin(changed_model(s, t), shards=3), allow_bin=True)
    yield make("22 payload", lambda t: as_bin(changed_model(s, t), extra={"x": Payload(f"touch '{trace}'")}), allow_bin=True)
    yield make("22 payload, not asked for", lambda t: as_bin(changed_model(s, t), extra={"x": Payload(f"touch '{trace}'")}))
    code = {"auto_map": {"AutoConfig": "configuration_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"}}
    yield make("23 auto_map", lambda t: with_code(changed_model(s, t, **code), trace))
    target = {"_target_": "os.system", "_args_": [f"touch '{trace}'"]}
    yield make("23 target", lambda t: changed_model(s, t, rope_parameters={**TINY["rope_parameters"]}, **target))


@pytest.fixture(scope="module")
def seen(ranks: RankServer, source: Path, trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """By case, what each rank raised."""
    made = dict(cases(source, tmp_path_factory.mktemp("cases"), trace))
    found = ranks.run(
        "tests.support.imports:refusals", topology=Topology(tp=2), kwargs={"folders": list(made.values())}, timeout=300
    )
    return {name: [rank[number] for rank in found] for number, name in enumerate(made)}


def refused(seen: Seen, name: str, kind: str, *parts: str, untouched: bool = True) -> None:
    """Every rank raised `kind` with all `parts` in its message, within 10 s, and changed no parameter."""
    for rank, (got, message, seconds, touched) in enumerate(seen[name]):
        assert got == kind, f"{name} on rank {rank}: {got} {message}"
        for part in parts:
            assert part in message, f"{name} on rank {rank}: {part!r} is not in: {message}"
        assert seconds < 10 and not (untouched and touched), f"{name} on rank {rank}: {seconds} s, parameters changed: {touched}"


def accepted(seen: Seen, name: str) -> None:
    assert [(got, message) for got, message, _, _ in seen[name]] == [("", "")] * 2


def test_fault_07_an_error_on_rank_0_only_is_every_ranks(seen: Seen) -> None:
    refused(seen, "07 rank 0 only", "MappingError", f"missing: {UP} (96, 64)")
    assert seen["07 rank 0 only"][1][1].startswith("rank 0 failed while checking the source")


def test_fault_10_truncated_files(seen: Seen, source: Path) -> None:
    size = (source / "model.safetensors").stat().st_size
    refused(seen, "10 one byte", "CheckpointError", "model.safetensors must have ", f"but has {size - 1}")
    refused(seen, "10 empty", "CheckpointError", "model.safetensors must begin with a header", "0 bytes")
    refused(seen, "10 to the header", "CheckpointError", "model.safetensors must begin with a header", f"the file has {HEAD} bytes")


def test_fault_12_headers_that_lie(seen: Seen) -> None:
    refused(seen, "12 wider dtype", "CheckpointError", UP, "49152 bytes for F64")
    refused(seen, "12 integer dtype", "CheckpointError", f"{UP} is torch.int32")
    refused(seen, "12 dtype of its size", "CheckpointError", f"{UP} is torch.bfloat16, others are torch.float16")
    refused(seen, "12 overlap", "CheckpointError", "must begin at byte")
    refused(seen, "12 duplicate", "CheckpointError", "appears twice")
    refused(seen, "12 no size", "CheckpointError", "0 bytes for F32 [0, 64]")


def test_fault_13_a_header_of_2_to_the_63_bytes(seen: Seen) -> None:
    refused(seen, "13 length", "CheckpointError", f"says its header has {2**63}")


def test_fault_16_missing_tensors(seen: Seen) -> None:
    refused(seen, "16 missing", "MappingError", f"missing: {UP} (96, 64)", "missing: model.norm.weight (64,)")
    near = UP.replace("up_", "upp_")
    refused(seen, "16 renamed", "MappingError", f"missing: {UP} (96, 64); the nearest name there is {near}", f"unexpected: {near}")
    refused(seen, "16 no head", "MappingError", "missing: lm_head.weight")


def test_fault_17_extra_tensors(seen: Seen) -> None:
    refused(seen, "17 extra", "MappingError", "unexpected: model.extra (2,), which no rule of LlamaForCausalLM consumes")
    accepted(seen, "17 allowed")


def test_fault_18_other_shapes(seen: Seen) -> None:
    refused(seen, "18 transposed", "MappingError", f"{UP} is (64, 96) (transposed), the config asks for (96, 64)")
    refused(seen, "18 vocabulary", "MappingError", "model.embed_tokens.weight is (131, 64)", "(140, 64)", "lm_head")
    refused(seen, "18 padded", "MappingError", "lm_head.weight is (132, 64), the config asks for (131, 64)")
    refused(seen, "18 heads", "MappingError", "k_proj")
    refused(seen, "18 rope", "ConfigError", "rope_type='spiral'")


def test_fault_19_weights_that_are_no_numbers(seen: Seen) -> None:
    for name in ("19 nan", "19 overflow", "19 unverified"):
        refused(seen, name, "CheckpointError", "must be finite", f"\n  {UP}", "allow_nonfinite", untouched=False)
    refused(seen, "19 inf", "CheckpointError", "\n  model.layers.2.self_attn.k_proj.weight", untouched=False)
    accepted(seen, "19 allowed")


def test_fault_20_a_wrong_tensor_is_localised(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    """What no comparison of bits can see: a source that was wrong before. The comparison with transformers names the module."""
    query, key, value = (f"model.layers.2.self_attn.{part}_proj.weight" for part in "qkv")

    def halves(tensors: Tensors, name: str) -> None:
        tensors[name] = torch.cat(tensors[name].chunk(2)[::-1]).contiguous()

    def swap(tensors: Tensors, one: str, other: str) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    made: list[tuple[Callable[[Tensors], object], str]] = [
        (lambda x: halves(x, query), "model.layers.2.self_attn.q_proj"),
        (lambda x: swap(x, key, value), "model.layers.2.self_attn.k_proj"),
        (lambda x: x[UP].zero_(), "model.layers.1.mlp.up_proj"),
        (lambda x: x["model.layers.0.mlp.down_proj.weight"].zero_(), "model.layers.0.mlp.down_proj"),
        (lambda x: x["model.embed_tokens.weight"].zero_(), "model.embed_tokens"),
        (lambda x: x["lm_head.weight"].neg_(), "lm_head"),
    ]
    bad = [str(changed_model(source, tmp_path / str(number), change)) for number, (change, _) in enumerate(made)]
    for layout in (Topology(), Topology(tp=2, pp=2)):
        kwargs = {"good": str(source), "bad": bad, "file": str(tmp_path / "events.pt")}
        for figures in ranks.run("tests.support.imports:localised", topology=layout, kwargs=kwargs):
            assert figures[0][1] is None and figures[0][0] < 1e-3
            assert [place for _, place in figures[1:]] == [place for _, place in made]
            assert all(distance > 1e-3 for distance, _ in figures[1:])


def test_fault_21_a_tied_flag_that_contradicts_the_file(seen: Seen) -> None:
    refused(seen, "21 untied head", "CheckpointError", "lm_head.weight differs from model.embed_tokens.weight", untouched=False)


def test_fault_22_pickles(seen: Seen, trace: Path, tmp_path: Path) -> None:
    for name in ("22 not asked for", "22 payload, not asked for"):
        refused(seen, name, "CheckpointError", "it has pytorch_model.bin", "conversion.allow_bin=true")
    refused(seen, "22 payload", "CheckpointError", "asks for more than tensors", "posix.system", "it was not run")
    accepted(seen, "22 single")
    accepted(seen, "22 sharded")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(f"touch '{tmp_path / 'ran'}'")))
    assert (tmp_path / "ran").exists(), "the payload works"


def test_fault_23_code_in_a_config_is_not_run(seen: Seen, trace: Path) -> None:
    accepted(seen, "23 auto_map")
    refused(seen, "23 target", "ConfigError", "_target_='os.system'")
    assert not trace.exists()


@pytest.mark.parametrize("how", ["truncated", "replaced"])
def test_fault_25_a_file_that_changes_while_it_is_loaded(ranks: RankServer, source: Path, tmp_path: Path, how: str) -> None:
    folder = changed_model(source, tmp_path / how)
    kwargs = {"source": str(folder), "how": how}
    for kind, message, seconds in ranks.run("tests.support.imports:changed_while_loading", topology=Topology(tp=2), kwargs=kwargs):
        assert kind == "CheckpointError" and seconds < 10
        assert f"{folder}/model.safetensors" in message and "changed while being read" in message


def test_fault_25_a_rank_that_dies_of_a_truncated_file_is_named_with_it(ranks: RankServer, source: Path, tmp_path: Path) -> None:
    folder = changed_model(source, tmp_path / "copy")
    with pytest.raises(RankError) as caught:
        ranks.run("tests.support.imports:killed_by_a_truncated_file", topology=Topology(tp=2), kwargs={"source": str(folder)})
    assert caught.value.failure["rank"] == 1
    assert "SIGBUS" in caught.value.failure["error"]
    assert f"{folder}/model.safetensors had " in caught.value.failure["error"]
    assert "and now has 64" in caught.value.failure["error"]
