"""Conversion, layers and backends on one CUDA device, in this process."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from megabridge.config.optional_packages import is_installed
from megabridge.families import all_families

ON_GPU = torch.cuda.is_available() and os.environ["MEGABRIDGE_PLATFORM"] == "cuda"
pytestmark = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and make test-gpu")
ARCHITECTURES = sorted(all_families())
MIXTURES = sorted(name for name, family in all_families().items() if "num_moe_experts" in family.native(family.tiny))


@pytest.fixture(scope="module")
def single() -> Iterator[None]:
    from megabridge.parallel import process_groups
    from megabridge.parallel.topology import Topology

    process_groups.start(Topology())
    yield
    process_groups.stop()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support import families

    root = tmp_path_factory.mktemp("sources")
    families.make(str(root), ARCHITECTURES)
    return root


def payload(folder: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def provide(source: Path, **settings: Any) -> tuple[Any, list[Any]]:
    from megabridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(source)
    return bridge, bridge.to_megatron_model(**settings)


@pytest.mark.parametrize("reader", ["mapped", "sequential"])
def test_there_and_back_and_streamed(reader: str, single: None, sources: Path, tmp_path: Path) -> None:
    source = sources / "LlamaForCausalLM"
    bridge, model = provide(source)
    assert all(parameter.is_cuda for chunk in model for parameter in chunk.parameters())
    for parameter in model[0].parameters():
        parameter.data.fill_(7.0)
    report = bridge.load_hf_weights(model, reader=reader, show_progress=False)
    assert report.mismatched == ()
    bridge.save_hf_pretrained(model, tmp_path / "hf", show_progress=False)
    expected = payload(source)
    assert payload(tmp_path / "hf") == expected
    for cpu in (False, True):
        with closing(bridge.export_hf_weights(model, cpu=cpu, show_progress=False, bucket_bytes=1 << 14)) as stream:
            seen = dict(stream)
        assert {tensor.is_cuda for tensor in seen.values()} == {not cpu}
        assert {name: tensor.cpu().view(torch.uint8).numpy().tobytes() for name, tensor in seen.items()} == expected
        with closing(bridge.export_hf_buckets(model, cpu=cpu, bucket_bytes=1 << 14)) as buckets:
            flat = {entry.name: entry.view(bytes_).clone() for bytes_, entries in buckets for entry in entries}
        assert {name: tensor.cpu().view(torch.uint8).numpy().tobytes() for name, tensor in flat.items()} == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_bytes_in_fp32(architecture: str, single: None, sources: Path, tmp_path: Path) -> None:
    from megabridge.conformance.tiny_model import read_reference
    from megabridge.models.logits import gather_logits

    torch.backends.cuda.matmul.allow_tf32 = False
    bridge, model = provide(sources / architecture, backend="torch")
    reference = read_reference(sources / architecture)
    logits, expected = gather_logits(model, reference.prompt).cpu(), reference.logits
    bridge.save_hf_pretrained(model, tmp_path / "hf", show_progress=False)
    assert payload(tmp_path / "hf") == payload(sources / architecture)
    # fp32 sums in another order, on kernels of their own, relative to the largest logit
    assert ((logits - expected).abs().max() / expected.abs().max()).item() < 2e-4


@pytest.mark.skipif(not is_installed("transformer_engine"), reason="Transformer Engine is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformer_engine(architecture: str, single: None, sources: Path, tmp_path: Path) -> None:
    """Where the architecture allows it: bytes are equal, and bf16 logits as near to fp32 as the torch backend's are."""
    from megabridge.conformance.tiny_model import read_reference
    from megabridge.errors import ConfigError
    from megabridge.models.logits import gather_logits

    source = sources / architecture
    reference = read_reference(source)
    expected = reference.logits
    distance = {}
    for backend in ("torch", "te"):
        try:
            bridge, model = provide(source, backend=backend, params_dtype=torch.bfloat16)
        except ConfigError as error:
            assert backend == "te" and "needs backend=torch" in str(error)
            pytest.skip(str(error).splitlines()[0])
        logits = gather_logits(model, reference.prompt).cpu()
        distance[backend] = ((logits - expected).norm() / expected.norm()).item()
        if backend == "te":
            bridge.save_hf_pretrained(model, tmp_path / "hf", show_progress=False, weight_dtype=torch.float32)
            # Correction biases of routers stay in fp32.
            theirs = {
                name: tensor if "correction" in name or name.endswith("moe_statics") else tensor.bfloat16().float()
                for name, tensor in _tensors(source).items()
            }
            ours = _tensors(tmp_path / "hf")
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"{architecture}: relative distance from fp32 logits {distance}")
    assert distance["te"] < 1.5 * distance["torch"] + 0.01, distance


@pytest.mark.parametrize("architecture", MIXTURES)
def test_grouped_products_beside_one_after_another(
    architecture: str, single: None, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's experts on the same tokens, some of them with none: outputs and gradients by grouped_mm and by a loop, in bf16."""
    from megabridge.models.layers import experts

    _, (chunk,) = provide(sources / architecture, backend="torch", params_dtype=torch.bfloat16, wrap_with_ddp=False)
    layer = next(module for module in chunk.modules() if isinstance(module, experts.GroupedExperts))
    torch.manual_seed(1)
    counts = torch.tensor([7, 0, 33, 1, *[5] * (layer.count - 4)])
    tokens = torch.randn(int(counts.sum()), layer.config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    probs = torch.rand(tokens.shape[0], device="cuda")
    seen, can_group = [], experts._can_group
    for kind in ("grouped", "loop"):
        monkeypatch.setattr(experts, "_can_group", can_group if kind == "grouped" else lambda *_: False)
        layer.zero_grad()
        tokens.grad = None
        out, _ = layer(tokens, counts, probs)
        out.float().square().sum().backward()
        seen.append(
            [out.detach().float(), tokens.grad.float(), *(parameter.grad.float().clone() for parameter in layer.parameters())]
        )
    assert can_group(tokens, layer.linear_fc1.weight)
    for grouped, looped in zip(*seen, strict=True):
        assert (grouped - looped).norm() < 0.01 * looped.norm()  # both round to bf16 after every product


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("style", "settings"),
    [
        ({}, {}),
        ({}, {"window_size": (40, 0)}),
        ({"attention_softcap": 5.0}, {}),
        ({}, {"softmax_type": "learnable", "window_size": (40, 0)}),
        ({"query_temperature": (0.5, 8, 1), "qk_norm": "rotated"}, {}),
        ({"attention_chunks": True}, {"window_size": (39, 0)}),
    ],
)
def test_packed_attention_beside_attention_of_each_document(
    style: dict[str, Any], settings: dict[str, Any], dtype: torch.dtype, single: None
) -> None:
    from megabridge.models.layer_options import LayerOptions
    from megabridge.models.layers.attention import TorchAttention
    from megabridge.models.layers.packed import packed

    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=512, num_attention_heads=8, num_query_groups=2, attention_dropout=0.0, **settings
    )
    made = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self", "options": LayerOptions(**style)}
    attention = TorchAttention(config, **made).cuda().to(dtype)
    documents = torch.tensor([[0] * 100 + [1] * 7 + [2] * 93, [0] + [1] * 150 + [2] * 49])
    places = torch.cat([torch.arange(size) for size in (100, 7, 93, 1, 150, 49)]).reshape(2, -1)
    params = packed(documents, places.cuda())
    assert params.bounds == (0, 100, 107, 200, 201, 351, 400)
    shapes = [(400, heads, 64) for heads in (8, 2, 2)]
    leaves = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
    out = attention(*leaves, None, packed_seq_params=params)
    out.float().square().sum().backward()
    got = [out, *(leaf.grad for leaf in leaves)]
    assert params.masks, "one kernel took all documents"
    apart = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    bounds = params.bounds
    parts = [attention(*(leaf[begin:end, None] for leaf in apart), None) for begin, end in itertools.pairwise(bounds)]
    expected = torch.cat(parts)
    expected.float().square().sum().backward()
    limit = 2e-2 if dtype is torch.bfloat16 else 2e-3
    for ours, theirs in zip(got, [expected, *(leaf.grad for leaf in apart)], strict=True):
        assert ours.shape == theirs.shape
        assert ((ours - theirs).norm() / theirs.norm()).item() < limit


def test_packed_rows_have_the_loss_of_padded_ones(single: None) -> None:
    from tests.support import packing

    found = packing.both({"seq_length": 64, "kv_channels": 16})
    padded, packed = (found[name]["totals"] for name in ("padded", "packed"))
    assert packed[1] == padded[1] > 100
    assert packed[0] / packed[1] == pytest.approx(padded[0] / padded[1], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "softcap", "has"),
    [(100, None, ""), (None, 5.0, ""), (100, 5.0, "sinks"), (17, None, "sinks"), (None, None, "sinks"), (100, None, "chunks")],
)
def test_flex_attention_beside_the_formula(window: int | None, softcap: float | None, has: str, dtype: torch.dtype) -> None:
    from megabridge.models.layers import flex

    torch.manual_seed(0)
    shape = (2, 8, 300, 64)
    query, key, value = (
        torch.randn(shape if i == 0 else (2, 2, 300, 64), device="cuda", dtype=dtype, requires_grad=True) for i in range(3)
    )
    sinks = torch.randn(8, device="cuda", dtype=dtype, requires_grad=True)
    mask = flex.causal_mask(300, window, query.device, chunks=has == "chunks")
    out = flex.attend(query, key, value, mask=mask, softcap=softcap, scale=0.125, sinks=sinks if has == "sinks" else None)
    out.float().square().sum().backward()
    leaves = [query, key, value, *([sinks] if has == "sinks" else [])]
    got = [out, *(leaf.grad for leaf in leaves)]
    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scores = plain[0] @ plain[1].repeat_interleave(4, 1).transpose(-1, -2) * 0.125
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(300, device="cuda")
    distance = positions[:, None] - positions[None]
    is_far = positions[:, None] // 100 != positions[None] // 100 if has == "chunks" else distance >= (window or 300)
    scores = scores.masked_fill((distance < 0) | is_far, -torch.inf)
    if has == "sinks":
        scores = torch.cat([scores, plain[3][:, None, None].expand(2, 8, 300, 1)], -1)
    expected = scores.softmax(-1)[..., :300] @ plain[2].repeat_interleave(4, 1)
    expected.square().sum().backward()
    wanted = [expected, *(tensor.grad for tensor in plain)]
    limit = 1e-2 if dtype is torch.bfloat16 else 2e-3  # rounding of inputs to bf16, or to tf32 inside the kernel
    for ours, theirs in zip(got, wanted, strict=True):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < limit
