"""Quantised folders for tests, made by plain arithmetic on whole tensors, and what ranks do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megabridge import AutoBridge
from megabridge.bridge import weights
from megabridge.conversion import exporter, read_loop, verify
from megabridge.hf.tensor_files import stored_tensors
from tests.support.convert import bridge_tp, provide
from tests.support.imports import caught, digest, small_window
from tests.support.memory import watched

FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def dequantised(packed: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] = (128, 128)) -> torch.Tensor:
    """Whole tensors, by repeating each scale over its block."""
    rows, columns = packed.shape[-2:]
    spread = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return (packed.float() * spread).to(torch.bfloat16)


def random_fp8(shape: tuple[int, ...], block: tuple[int, int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 numbers, and scales that differ from block to block."""
    packed = torch.randn(shape, generator=generator).mul_(2.0).to(torch.float8_e4m3fn)
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    return packed, torch.rand(grid, generator=generator) * 0.05 + 0.01


def write_fp8(source: str, block: tuple[int, int], **settings: Any) -> None:
    """Beside the folder `source`: `fp8`, whose linears in layers are random blocks, and `plain`, what they stand for."""
    generator = torch.Generator().manual_seed(3)
    given = Path(source)
    tensors = load_file(given / "model.safetensors")
    packed, same = dict(tensors), dict(tensors)
    plain = ("gate.weight", "embed_tokens.weight", "head.weight", "eh_proj.weight")
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() == 2 and not name.endswith(plain):
            numbers, scales = random_fp8(tuple(tensor.shape), block, generator)
            packed[name], packed[name + "_scale_inv"] = numbers, scales
            same[name] = dequantised(numbers, scales, block)
    write_both(given, packed, same, {**FP8, "weight_block_size": list(block), **settings})


def write_mxfp4(source: str) -> None:
    """The same of random MXFP4, for gpt-oss: `fp8` names the quantised folder here too."""
    generator = torch.Generator().manual_seed(3)
    given = Path(source)
    packed = load_file(given / "model.safetensors")
    same = dict(packed)
    for name in [name for name in packed if name.endswith("_proj")]:
        experts, columns, rows = packed.pop(name).shape
        numbers = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": numbers, f"{name}_scales": scales}
        same[name] = convert_moe_packed_tensors(numbers, scales)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
    write_both(given, packed, same, said)


def write_both(given: Path, packed: dict[str, torch.Tensor], same: dict[str, torch.Tensor], said: dict[str, Any]) -> None:
    config = json.loads((given / "config.json").read_text())
    for folder, content, what in (("fp8", packed, {"quantization_config": said}), ("plain", same, {})):
        target = given.with_name(folder)
        target.mkdir()
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({**config, **what}, indent=2))


def imports(fp8: str, plain: str, out: str) -> list[dict[str, Any]]:
    """The quantised folder in every way of reading, beside the plain one; then exported."""
    reference = AutoBridge.from_hf_pretrained(plain)
    expected = digest(provide(reference, sequence_parallel=bridge_tp() > 1))
    bridge = AutoBridge.from_hf_pretrained(fp8)
    seen = []
    for settings in ({"reader": "mapped"}, {"reader": "sequential"}, {"dedupe": True}):
        model = provide(bridge, load_weights=False, sequence_parallel=bridge_tp() > 1)
        with small_window():
            report = bridge.load_hf_weights(model, show_progress=False, **settings)
        infos = weights.open_weights(bridge.source, bridge.state, None, None, allow_bin=False)
        pairs = [(item.hf[transfer.part], transfer.elements) for item in bridge.plan(model).items for transfer in item.transfers]
        seen.append(
            {
                "equal": digest(model) == expected,
                "copied": report.copied_by_rank,
                "stored": sum(elements * stored_tensors(infos[name])[0].nbytes // infos[name].elements for name, elements in pairs),
                "quantised": sum(info.encoding is not None for info in infos.values()),
                "report": (report.bytes, report.is_verified, report.mismatched),
            }
        )
    bridge.save_hf_pretrained(model, out, show_progress=False, weight_dtype="source")
    return seen


def refusals(folders: list[str]) -> list[tuple[str, str, float]]:
    """(error type, message, seconds) of importing each folder, and where that is refused on the way, of opening it."""
    return [caught(lambda folder=folder: provide(AutoBridge.from_hf_pretrained(folder))) for folder in folders]


def memory(fp8: str) -> list[dict[str, int]]:
    """Per way of reading, the most anonymous memory of an import beside the model."""
    read_loop.threads_of_a_rank = lambda: read_loop._MOST_THREADS
    bridge = AutoBridge.from_hf_pretrained(fp8)
    model = provide(bridge, load_weights=False)
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0)  # its pages exist from here on
    out = []
    for way in ("mapped", "sequential"):
        seen: dict[str, int] = {}
        with watched(seen, "before"):
            pass
        with watched(seen, "import"):
            bridge.load_hf_weights(model, show_progress=False, reader=way)
        out.append(seen)
    return out


def by_transformers(fp8: str, plain: str) -> list[str]:
    """Tensors that transformers dequantises otherwise than `plain` has them."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import quantizer_finegrained_fp8

    quantizer_finegrained_fp8.is_accelerate_available = lambda: True  # asked for, and not used on a CPU
    theirs = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).state_dict()
    assert theirs.keys() == ours.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def by_way_of_native(fp8: str, native: str, out: str) -> None:
    """Imported to a native checkpoint and exported from it, in one call each."""
    AutoBridge.import_ckpt(fp8, native, show_progress=False)
    AutoBridge.from_auto_config(native).export_ckpt(native, out, show_progress=False)


def exports(source: str, outs: dict[str, dict[str, Any]]) -> list[Any]:
    """The model published to each of `outs` with its settings; what `verify` finds wrong with each, beside the source too."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge, sequence_parallel=bridge_tp() > 1)
    found = []
    for out, settings in outs.items():
        report = bridge.save_hf_pretrained(model, out, show_progress=False, quantization="fp8_block", **settings)
        found.append(
            (
                report.is_verified,
                report.mismatched,
                verify.against_manifest(Path(out)),
                verify.against_source(Path(out), Path(source)),
            )
        )
    return found


def export_refusals(given: list[tuple[str, dict[str, Any]]], out: str) -> list[tuple[str, str]]:
    """What publishing each (source, settings) raises, and that nothing is published."""
    found = []
    for source, settings in given:
        bridge = AutoBridge.from_hf_pretrained(source)
        model = provide(bridge)
        with torch.no_grad():
            if settings.pop("nan", False):
                next(p for chunk in model for name, p in chunk.named_parameters() if "linear_fc1" in name)[0, 0] = torch.nan
        kind, message, _ = caught(
            lambda bridge=bridge, model=model, settings=settings: bridge.save_hf_pretrained(
                model, out, show_progress=False, **settings
            )
        )
        assert not Path(out).exists()
        found.append((kind, message))
    return found


def damaged_exports(source: str, out: str, tensors: list[str], writer: str) -> list[tuple[str, str]]:
    """A bit of a tensor is lost between writing and reading back."""
    bridge = AutoBridge.from_hf_pretrained(source)
    model = provide(bridge)
    read = exporter._headers
    found = []
    for name in tensors:

        def damaging(partial: Path, shard: Any, name: str = name) -> Any:
            info = shard.tensors[name]
            if torch.distributed.get_rank() == 0:
                with info.file.open("r+b") as stream:
                    stream.seek(info.start + 2)
                    (value,) = stream.read(1)
                    stream.seek(info.start + 2)
                    stream.write(bytes([value ^ 4]))
            if writer == "shared":
                torch.distributed.barrier()
            return read(partial, shard)

        exporter._headers = damaging
        try:
            kind, message, _ = caught(
                lambda: bridge.save_hf_pretrained(model, out, show_progress=False, quantization="fp8_block", writer=writer)
            )
        finally:
            exporter._headers = read
        found.append((kind, message))
    return found


def as_transformers_quantises(fp8: str, plain: str, ue8m0: bool) -> list[str]:
    """Tensors of `fp8` that transformers makes otherwise of `plain`."""
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    quantise = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(scale_fmt="ue8m0" if ue8m0 else "float")))
    ours, source = load_file(Path(fp8) / "model.safetensors"), load_file(Path(plain) / "model.safetensors")
    wrong = []
    for name in (name.removesuffix("_scale_inv") for name in ours if name.endswith("_scale_inv")):
        theirs = quantise._quantize_one(name, source[name])
        pairs = [(ours[key].float(), tensor.float()) for key, tensor in theirs.items()]
        wrong += [name] if len(pairs) != 2 or not all(torch.equal(a, b) for a, b in pairs) else []
    return wrong
