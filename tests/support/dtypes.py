"""What processes do with checkpoints that mix dtypes in the bridge's tests."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megabridge import AutoBridge
from megabridge.conversion.report import Report
from megabridge.native import checkpoint, reader
from megabridge.peft import LoRA
from tests.support.bridge import refusal
from tests.support.models import TINY, TINY_MIXTURE, write_model

BF16, F16, F32, F64, F8 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2
TIED: dict[str, Any] = {**TINY, "tie_word_embeddings": True}

Choose = Callable[[str], torch.dtype | None]
"""A tensor's dtype by its name, None for the config's."""
SOURCES: Mapping[str, tuple[dict[str, Any], torch.dtype, Choose]] = {
    "norms": (TIED, BF16, lambda name: F32 if "norm" in name else None),
    "one double": (TINY, F32, lambda name: F64 if "layers.1.mlp.down_proj" in name else None),
    "parts of a fused one": (TIED, BF16, lambda name: F32 if re.search(r"layers.1.*(k_proj|up_proj)|lm_head", name) else None),
    "half": (TINY, F16, lambda name: F32 if "layernorm" in name else F64 if name == "model.norm.weight" else None),
    "bytes": (TINY, BF16, lambda name: F8 if "o_proj" in name else F64 if "layers.0.self_attn.v_proj" in name else None),
    "a mixture": (TINY_MIXTURE, BF16, lambda name: F32 if re.search(r"gate|layers.1.*experts.2.w1", name) else None),
    "config of another": ({**TINY, "dtype": "float32"}, BF16, lambda name: F64 if "norm" in name else None),
}


def make(root: Path, name: str) -> Path:
    """A source whose tensors use every bit of their dtypes; a tied one has its redundant lm_head."""
    from safetensors.torch import load_file, save_file

    config, most, choose = SOURCES[name]
    said = config["dtype"] if name == "config of another" else str(most).removeprefix("torch.")
    folder = write_model(root / name, {**config, "dtype": said})
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        dtype = choose(key) or most
        tensors[key] = (torch.randn(tensor.shape, generator=generator, dtype=F64) * 0.1).to(dtype)
    if config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(choose("lm_head.weight") or most, copy=True)
    (folder / "model.safetensors").unlink()
    files = _shards(tensors) if name == "half" else {"model.safetensors": tensors}
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": {key: file for file, held in files.items() for key in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Three files as no limit of a size makes them."""
    held: dict[str, dict[str, torch.Tensor]] = {f"model-0000{number}-of-00003.safetensors": {} for number in (1, 2, 3)}
    for number, (name, tensor) in enumerate(tensors.items()):
        held[list(held)[number % 5 // 2]][name] = tensor
    return held


def sources(root: str) -> None:
    for name in SOURCES:
        make(Path(root), name)


def there_and_back(root: str, out: str, **layout: int) -> dict[str, Any]:
    """Every source through a native checkpoint, there under `layout`; what the reports and the prints say."""
    said = {}
    for name in SOURCES:
        native_folder = Path(out) / name / "native"
        native_folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            more = {"sequence_parallel": True} if "tp" in layout and name == "a mixture" else {}  # megatron-core asks for it
            imported = AutoBridge.import_ckpt(Path(root) / name, native_folder, show_progress=False, **layout, **more)
            bridge = AutoBridge.from_auto_config(native_folder)
            exported = bridge.export_ckpt(native_folder, Path(out) / name / "hf", show_progress=False)
        said[name] = {"lost": [*imported.rounded, *exported.rounded, *imported.mismatched], "printed": printed.getvalue()}
    return said


def rounding(root: str, out: str) -> dict[str, Any]:
    """What says that something is rounded, by the way it took; with the dtypes that config.json and the files have."""
    said: dict[str, Any] = {}
    source, target = Path(root) / "norms", Path(out)

    def note(name: str, work: Callable[[], Report | None]) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            report = work()
        casts = [f"{before} to {now}" for before, now in (report.rounded if report else {}).values()]
        counts = {kind: casts.count(kind) for kind in set(casts)}
        said[name] = {
            "casts": counts,
            "printed": printed.getvalue(),
            "report": str(report),
            "dtypes": report and dict(report.dtypes),
        }

    bridge = AutoBridge.from_hf_pretrained(source)
    models: list[list[torch.nn.Module]] = []

    def imported() -> Report | None:
        models.append(bridge.to_megatron_model())
        return bridge.import_report

    note("import", imported)
    (model,) = models
    note("export", lambda: bridge.save_hf_pretrained(model, target / "plain", False))
    note("export, source", lambda: bridge.save_hf_pretrained(model, target / "source", False, weight_dtype="source"))
    bridge.save_megatron_model(model, target / "ran")
    wide = AutoBridge.from_hf_pretrained(source, dtype="float32")
    whole = wide.to_megatron_model()
    note("wide", lambda: wide.save_hf_pretrained(whole, target / "wide", False, weight_dtype="source"))
    note("cast", lambda: AutoBridge.import_ckpt(source, target / "cast", dtype="bfloat16", show_progress=False))
    note("cast, export", lambda: bridge.export_ckpt(target / "cast", target / "cast_hf", False))
    own = AutoBridge.from_auto_config(target / "cast")
    again = own.load_megatron_model(target / "cast", dtype="float32")
    note("cast, wide", lambda: own.save_hf_pretrained(again, target / "cast_wide", False, weight_dtype="source"))
    AutoBridge.import_ckpt(source, target / "kept", show_progress=False)
    note("kept, run", lambda: models.append(own.load_megatron_model(target / "kept")))
    note("kept, run, export", lambda: own.save_hf_pretrained(models[1], target / "kept_hf", False, weight_dtype="source"))
    note("ran, export", lambda: bridge.export_ckpt(target / "ran", target / "ran_hf", False))
    stored = reader.open_folder(checkpoint.locate(target / "kept")).tensors()
    said["stored"] = {str(dtype) for key, (dtype, _) in stored.items() if "norm" in key}
    return said


def mixed_parameters(root: str, out: str) -> None:
    """An export in the parameters' dtypes, which are two: routers' correction biases stay in fp32."""
    from megabridge.conformance import check_family, tiny_model
    from megabridge.families import glm4_moe

    config = {**tiny_model.tiny_config(glm4_moe.FAMILY, check_family.LAYERS), "dtype": "float32"}
    tiny_model.write_tiny_model(Path(root) / "glm", config, glm4_moe.FAMILY, ranks=4)
    bridge = AutoBridge.from_hf_pretrained(Path(root) / "glm", dtype="bfloat16")
    bridge.save_hf_pretrained(bridge.to_megatron_model(), Path(out) / "glm", False)


def refused(root: str, out: str) -> tuple[str, str]:
    """What is said of a config whose dtype no model computes in, and of weights that are integers."""
    from safetensors.torch import load_file, save_file

    other = write_model(Path(root) / "integers", TIED)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    integers = refusal(lambda: AutoBridge.import_ckpt(other, Path(out) / "never", show_progress=False))
    folder = write_model(Path(root) / "double", {**TINY, "dtype": "float32"})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("float32", "float64"))
    return refusal(lambda: AutoBridge.from_hf_pretrained(folder)), integers


def adapters(root: str, out: str) -> dict[str, Any]:
    """Adapters in fp32 in a model in bf16, and a stream of tensors in more precision than the model has."""
    wide = AutoBridge.from_hf_pretrained(Path(root) / "norms", dtype="float32")
    wide.save_hf_adapter(wide.to_megatron_model(peft=LoRA(r=2, target_modules=("q_proj",))), Path(out) / "adapter", False)
    bridge = AutoBridge.from_hf_pretrained(Path(root) / "norms")
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        model = bridge.to_megatron_model(peft=str(Path(out) / "adapter"))
        dict(bridge.export_hf_weights(model, show_progress=False, weight_dtype="source"))
    return {"printed": printed.getvalue(), "dtypes": {str(p.dtype) for p in model[0].parameters()}}
